// Video instructions: small integers, alone or several in a register. PTX ISA 9.7.18 and 9.7.17. Selectors, masks and
// merging are left out: compilers do not write them.
#include "pick.h"

namespace ptx {

namespace {

enum Operation { Add, Subtract, Average, Distance, Least, Most };

// number: the operation, what becomes of the results (below), bits of an element, its signs (a, b, d), .sat
enum Merge { Alone, AddThird, LeastWithThird, MostWithThird };

int64_t element(uint32_t bits, unsigned k, unsigned width, bool is_signed) {
    uint64_t at_top = (uint64_t)bits >> k * width << (64 - width);
    return is_signed ? (int64_t)at_top >> (64 - width) : (int64_t)(at_top >> (64 - width));
}

int64_t computed(Operation operation, int64_t a, int64_t b) {
    switch (operation) {
    case Add: return a + b;
    case Subtract: return a - b;
    case Average: return (a + b + (a + b >= 0)) >> 1;              // the middle goes away from zero
    case Distance: return a < b ? b - a : a - b;
    case Least: return a < b ? a : b;
    default: return a > b ? a : b;
    }
}

int64_t clamped(int64_t x, unsigned width, bool is_signed) {
    int64_t least = is_signed ? -(1ll << (width - 1)) : 0, most = (1ll << (is_signed ? width - 1 : width)) - 1;
    return x < least ? least : x > most ? most : x;
}

Step run(Warp& warp, const Instruction& i, Mask active) {
    uint32_t* d = warp.values<uint32_t>(i.slot[0]);
    const uint32_t *a = warp.values<uint32_t>(i.slot[1]), *b = warp.values<uint32_t>(i.slot[2]);
    const uint32_t* c = i.slot[3] ? warp.values<uint32_t>(i.slot[3]) : nullptr;
    auto operation = (Operation)i.number[0];
    auto merge = (Merge)i.number[1];
    unsigned width = i.number[2];
    bool a_signed = i.number[3] & 1, b_signed = i.number[3] & 2, d_signed = i.number[3] & 4;
    each_lane(active, [&](unsigned lane) {
        uint32_t packed = 0;
        int64_t sum = 0;
        for (unsigned k = 0; k < 32 / width; k++) {
            int64_t x = computed(operation, element(a[lane], k, width, a_signed), element(b[lane], k, width, b_signed));
            if (i.number[4]) x = clamped(x, width, d_signed);
            packed |= (uint32_t)((uint64_t)x << (64 - width) >> (64 - width) << k * width);
            sum += x;
        }
        if (merge == Alone) d[lane] = packed;
        else if (merge == AddThird) d[lane] = c[lane] + (uint32_t)(width == 32 ? packed : sum);
        else {
            int64_t x = element(packed, 0, 32, d_signed), y = element(c[lane], 0, 32, d_signed);
            d[lane] = computed(merge == LeastWithThird ? Least : Most, x, y);
        }
    });
    return Step::Next;
}

template <Operation operation, unsigned width> void video(Decoder& d) {
    bool to = d.type().kind == Type::Signed, a = d.type().kind == Type::Signed, b = d.type().kind == Type::Signed;
    d.out.number = {operation, Alone, width, a | b << 1 | to << 2, d.has("sat")};
    std::string merge = width == 32 ? d.one_of({"add", "min", "max"}, false) : d.one_of({"add"}, false);
    if (!merge.empty()) d.out.number[1] = merge == "add" ? AddThird : merge == "min" ? LeastWithThird : MostWithThird;
    same_type(d, B32, merge.empty() ? 2 : 3);         // without .add and a mask, c changes nothing
    d.out.run = run;
}

}  // namespace

Table video_instructions() {
    return {
        {"vadd", "9.7.18.1", video<Add, 32>},
        {"vsub", "9.7.18.1", video<Subtract, 32>},
        {"vabsdiff", "9.7.18.1", video<Distance, 32>},
        {"vmin", "9.7.18.1", video<Least, 32>},
        {"vmax", "9.7.18.1", video<Most, 32>},
        {"vadd2", "9.7.17.1", video<Add, 16>},
        {"vsub2", "9.7.17.1", video<Subtract, 16>},
        {"vavrg2", "9.7.17.1", video<Average, 16>},
        {"vabsdiff2", "9.7.17.1", video<Distance, 16>},
        {"vmin2", "9.7.17.1", video<Least, 16>},
        {"vmax2", "9.7.17.1", video<Most, 16>},
        {"vadd4", "9.7.17.3", video<Add, 8>},
        {"vsub4", "9.7.17.3", video<Subtract, 8>},
        {"vavrg4", "9.7.17.3", video<Average, 8>},
        {"vabsdiff4", "9.7.17.3", video<Distance, 8>},
        {"vmin4", "9.7.17.3", video<Least, 8>},
        {"vmax4", "9.7.17.3", video<Most, 8>},
    };
}

}  // namespace ptx
