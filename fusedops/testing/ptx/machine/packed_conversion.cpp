// Conversions that pack two numbers, and those of the narrow formats. PTX ISA 9.7.9.21 and 9.7.9.22.
#include "floats.h"

namespace ptx {

void scalar_cvt(Decoder& d);                          // conversion.cpp

namespace {

// Two results in one register, the first source above.
struct How {
    bool relu, finite;
    Rounding rounding;
};
How how_of(const Instruction& i) { return {i.number[0] != 0, i.number[1] != 0, (Rounding)i.number[2]}; }

double with_relu(double x, bool relu) { return relu && x <= 0 ? 0 : x; }

template <class Format> uint32_t narrow(float x, How how) {
    return Format::encode(with_relu(x, how.relu), how.rounding, how.finite);
}

uint32_t halves(float high, float low) { return (uint32_t)to_f16(high) << 16 | to_f16(low); }
uint32_t brains(float high, float low) { return (uint32_t)to_bf16(high) << 16 | to_bf16(low); }

// From two f32, or from one register of two f16.
template <class Format, class Pair> Step pack_floats(Warp& warp, const Instruction& i, Mask active) {
    Pair* d = warp.values<Pair>(i.slot[0]);
    const float *high = warp.values<float>(i.slot[1]), *low = warp.values<float>(i.slot[2]);
    How how = how_of(i);
    each_lane(active, [&](unsigned lane) {
        d[lane] = narrow<Format>(high[lane], how) << Format::BITS | narrow<Format>(low[lane], how);
    });
    return Step::Next;
}
template <class Format> Step narrow_halves(Warp& warp, const Instruction& i, Mask active) {
    uint16_t* d = warp.values<uint16_t>(i.slot[0]);
    const uint32_t* a = warp.values<uint32_t>(i.slot[1]);
    How how = how_of(i);
    each_lane(active, [&](unsigned lane) {
        float high = from_f16(a[lane] >> 16), low = from_f16(a[lane]);
        d[lane] = narrow<Format>(high, how) << 8 | narrow<Format>(low, how);
    });
    return Step::Next;
}
template <class Format> Step widen_to_halves(Warp& warp, const Instruction& i, Mask active) {
    uint32_t* d = warp.values<uint32_t>(i.slot[0]);
    const uint16_t* a = warp.values<uint16_t>(i.slot[1]);
    bool relu = i.number[0];
    each_lane(active, [&](unsigned lane) {
        float high = Format::decode(a[lane] >> 8), low = Format::decode(a[lane] & 255);
        high = relu && high <= 0 ? 0 : high, low = relu && low <= 0 ? 0 : low;
        d[lane] = halves(high, low);
    });
    return Step::Next;
}
Step to_tf32(Warp& warp, const Instruction& i, Mask active) {
    uint32_t* d = warp.values<uint32_t>(i.slot[0]);
    const float* a = warp.values<float>(i.slot[1]);
    How how = how_of(i);
    each_lane(active, [&](unsigned lane) {
        float x = a[lane];
        d[lane] = x != x ? 0x7FFFFFFF : narrow<FormatTF32>(x, how) << 13;
    });
    return Step::Next;
}

void from_floats(Decoder& d, const std::string& to) {
    Type result = to == "f16x2" ? Type{Type::FloatPair, 4} : to == "bf16x2" ? Type{Type::BrainPair, 4} : B16;
    d.out.slot[0] = d.write(0, result);
    d.out.slot[1] = d.read(1, F32);
    d.out.slot[2] = d.read(2, F32);
    bool plain = !d.out.number[0] && !d.out.number[1] && d.out.number[2] == (int64_t)Rounding::NearestEven;
    using Pair = uint32_t;
    if (to == "f16x2") d.out.run = plain ? mixed<Pair, float, float, halves> : pack_floats<FormatF16, Pair>;
    else if (to == "bf16x2") d.out.run = plain ? mixed<Pair, float, float, brains> : pack_floats<FormatBF16, Pair>;
    else d.out.run = to == "e4m3x2" ? pack_floats<FormatE4M3, uint16_t> : pack_floats<FormatE5M2, uint16_t>;
}

// ---- cvt.pack: two integers, clamped to few bits, go below those of c; number: the bits, whether they have a sign
Step pack_integers(Warp& warp, const Instruction& i, Mask active) {
    uint32_t* d = warp.values<uint32_t>(i.slot[0]);
    const int32_t *a = warp.values<int32_t>(i.slot[1]), *b = warp.values<int32_t>(i.slot[2]);
    const uint32_t* c = i.slot[3] ? warp.values<uint32_t>(i.slot[3]) : nullptr;
    unsigned bits = i.number[0];
    int32_t least = i.number[1] ? -(1 << (bits - 1)) : 0, most = (1 << (i.number[1] ? bits - 1 : bits)) - 1;
    uint32_t inside = (1u << bits) - 1;
    auto clamped = [&](int32_t x) { return (uint32_t)(x < least ? least : x > most ? most : x) & inside; };
    each_lane(active, [&](unsigned lane) {
        uint32_t above = c ? c[lane] << 2 * bits : 0;
        d[lane] = above | clamped(a[lane]) << bits | clamped(b[lane]);
    });
    return Step::Next;
}

void cvt_pack(Decoder& d) {
    d.one_of({"sat"});
    std::string to = d.one_of({"u16", "s16", "u8", "s8", "u4", "s4", "u2", "s2"});
    d.one_of({"s32"});
    d.out.number = {std::stoi(to.substr(1)), to[0] == 's'};
    bool third = d.out.number[0] < 16;
    if (third) d.one_of({"b32"});
    same_type(d, B32, third ? 3 : 2);
    d.out.run = pack_integers;
}

void cvt(Decoder& d) {
    const std::vector<std::string>& parts = d.statement.name;
    if (parts.size() < 3) d.unsupported();
    std::string to = parts[parts.size() - 2], from = parts.back();
    bool packed = to.size() > 2 && to.substr(to.size() - 2) == "x2", bytes = to == "e4m3x2" || to == "e5m2x2";
    bool from_bytes = from == "e4m3x2" || from == "e5m2x2";
    if (!packed && to != "tf32") return scalar_cvt(d);
    std::string rounding = d.one_of({"rn", "rz", "rna"});
    d.out.number = {d.has("relu"), d.has("satfinite"), (int64_t)rounding_of(rounding)};
    d.ignore({to.c_str(), from.c_str()});
    if (to == "tf32" && from == "f32") {
        d.out.slot[0] = d.write(0, B32);
        d.out.slot[1] = d.read(1, F32);
        d.out.run = to_tf32;
    } else if ((to == "f16x2" || to == "bf16x2" || bytes) && from == "f32") {
        from_floats(d, to);
    } else if (bytes && from == "f16x2") {
        d.out.slot[0] = d.write(0, B16);
        d.out.slot[1] = d.read(1, B32);
        d.out.run = to == "e4m3x2" ? narrow_halves<FormatE4M3> : narrow_halves<FormatE5M2>;
    } else if (to == "f16x2" && from_bytes) {
        d.out.slot[0] = d.write(0, B32);
        d.out.slot[1] = d.read(1, B16);
        d.out.run = from == "e4m3x2" ? widen_to_halves<FormatE4M3> : widen_to_halves<FormatE5M2>;
    } else d.unsupported("these formats");
    if (bytes && !d.out.number[1]) d.unsupported("without .satfinite");
}

}  // namespace

Table conversion_instructions() {
    return {
        {"cvt", "9.7.9.21", cvt},
        {"cvt.pack", "9.7.9.22", cvt_pack},
    };
}

}  // namespace ptx
