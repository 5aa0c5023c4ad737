// Products of matrices that a warp holds in registers: mma.sync, dense and sparse. PTX ISA 9.7.14.5 and 9.7.14.6.
#include "fragments.h"
#include "launch.h"

namespace ptx {

namespace {

enum { Rows, Depth, Types, Sums, Selector, Flags };  // instruction.number
constexpr int64_t Sparse = 1, Ordered = 2, Exclusive = 4;
enum { D, A, B, C };                                 // instruction.list

Step multiply(Warp& warp, const Instruction& i, Mask active) {
    if (Step s = warp.aligned(i, active); s != Step::Next) return s;
    Product& product = Product::scratch();
    unsigned rows = i.number[Rows], blocks = rows / 8;
    Sum kind = (Sum)i.number[Sums];
    product.shape(rows, 8, i.number[Depth], (Element)(i.number[Types] & 0xFF), (Element)(i.number[Types] >> 8),
                  i.number[Flags] & Sparse);
    product.exclusive = i.number[Flags] & Exclusive;
    for (unsigned r = 0; r < i.list[A].size(); r++)
        product.set_a(warp.values<uint8_t>(i.list[A][r]), r % blocks, r / blocks);
    for (unsigned r = 0; r < i.list[B].size(); r++) product.set_b(warp.values<uint8_t>(i.list[B][r]), 0, r);
    if (product.sparse)
        set_index(product, warp.values<uint32_t>(i.slot[4]), i.number[Selector], 0, i.number[Flags] & Ordered);

    uint32_t sums[128];
    unsigned each = kind == Sum::F16 ? 1 : 2;
    for (unsigned block = 0; block < blocks; block++)
        load_sums(kind, sums + 64 * block, warp.values<uint32_t>(i.list[C][each * block]),
                  warp.values<uint32_t>(i.list[C][each * block + each - 1]));
    product.add_to(kind, [&](unsigned row, unsigned) { return sums + 8 * row; });
    for (unsigned block = 0; block < blocks; block++)
        store_sums(kind, sums + 64 * block, warp.values<uint32_t>(i.list[D][each * block]),
                   warp.values<uint32_t>(i.list[D][each * block + each - 1]));
    return Step::Next;
}

// Doubles: a register is 8 rows (or columns of B) by 4 along k. Each product is added by fma, k ascending.
Step multiply_f64(Warp& warp, const Instruction& i, Mask active) {
    if (Step s = warp.aligned(i, active); s != Step::Next) return s;
    unsigned blocks = i.number[Rows] / 8;
    double sums[128];
    for (unsigned lane = 0; lane < LANES; lane++)
        for (unsigned n = 0; n < 2 * blocks; n++)
            sums[n / 2 * 64 + 2 * lane + n % 2] = warp.values<double>(i.list[C][n])[lane];
    for (unsigned k = 0; k < i.number[Depth]; k++)
        for (unsigned row = 0; row < 8 * blocks; row++) {
            double a = warp.values<double>(i.list[A][k / 4 * blocks + row / 8])[row % 8 * 4 + k % 4];
            const double* b = warp.values<double>(i.list[B][k / 4]) + k % 4;
            for (unsigned n = 0; n < 8; n++) sums[8 * row + n] = std::fma(a, b[4 * n], sums[8 * row + n]);
        }
    for (unsigned lane = 0; lane < LANES; lane++)
        for (unsigned n = 0; n < 2 * blocks; n++)
            warp.values<double>(i.list[D][n])[lane] = sums[n / 2 * 64 + 2 * lane + n % 2];
    return Step::Next;
}

void expect(Decoder& d, const char* operand, const std::vector<Slot>& slots, size_t count) {
    if (slots.size() != count)
        d.unsupported(format("%s must have %zu registers, got %zu", operand, count, slots.size()));
}

void mma_f64(Decoder& d, unsigned m, unsigned k) {
    for (int type = 0; type < 3; type++)
        if (d.next() != "f64") d.unsupported(".f64 with another type");
    d.ignore({"rn"});
    if (k % 4 || k > 16 || (m == 8 && k != 4)) d.unsupported("this shape");
    d.out.list[D] = d.write_list(0, F64), d.out.list[A] = d.read_list(1, F64);
    d.out.list[B] = d.read_list(2, F64), d.out.list[C] = d.read_list(3, F64);
    expect(d, "d", d.out.list[D], m / 4), expect(d, "a", d.out.list[A], m / 8 * k / 4);
    expect(d, "b", d.out.list[B], k / 4), expect(d, "c", d.out.list[C], m / 4);
    d.out.number[Rows] = m, d.out.number[Depth] = k;
    d.out.run = multiply_f64;
}

// What one row of A has in bytes decides which shapes there are: 16 or 32 bytes in 16 rows; integers also 16 in 8 rows.
void check_shape(Decoder& d, unsigned m, unsigned row_bytes, Element element, bool sparse) {
    bool fits = m == 16 && (row_bytes == 16 || row_bytes == 32);
    if (m == 8) fits = row_bytes == 16 && is_integer(element) && !sparse;
    if (sparse && bits_of(element) == 8 && !is_integer(element)) fits = row_bytes == 32;
    if (!fits) d.unsupported("this shape");
}

void operands(Decoder& d, unsigned m, unsigned row_bytes, Sum kind, bool sparse) {
    Instruction& out = d.out;
    out.list[D] = d.write_list(0, B32), out.list[A] = d.read_list(1, B32);
    out.list[B] = d.read_list(2, B32), out.list[C] = d.read_list(3, B32);
    size_t sums = m / 8 * (kind == Sum::F16 ? 1 : 2);
    expect(d, "d", out.list[D], sums), expect(d, "a", out.list[A], m / 8 * row_bytes / 16);
    expect(d, "b", out.list[B], row_bytes / 16 * (sparse ? 2 : 1)), expect(d, "c", out.list[C], sums);
}

void decode(Decoder& d, bool sparse, bool ordered) {
    d.ignore({"sync", "aligned"});
    unsigned m, n, k;
    char end;
    std::string shape = d.next();
    if (sscanf(shape.c_str(), "m%un%uk%u%c", &m, &n, &k, &end) != 3 || n != 8) d.unsupported("." + shape);
    d.one_of({"row"}), d.one_of({"col"});
    bool saturate = d.has("satfinite");
    int64_t flags = (sparse ? Sparse : 0) | (ordered ? Ordered : 0);
    if (d.has("popc") && d.one_of({"xor", "and"}) == "xor") flags |= Exclusive;
    std::string type = d.next();
    if (type == "f64" && !sparse) return mma_f64(d, m, k);
    Element a = element_named(d, d.next()), b = element_named(d, d.next());
    if (d.next() != type) d.unsupported("sums of another type than the result");
    Sum kind = sum_of(d, type, a, b);
    if (saturate && kind != Sum::S32Saturated) d.unsupported(".satfinite is for integers");
    if ((a == Element::B1) != (d.statement.name.back() == "popc")) d.unsupported(".popc goes with .b1");
    unsigned row_bytes = k * bits_of(a) / (sparse ? 16 : 8);
    check_shape(d, m, row_bytes, a, sparse);
    operands(d, m, row_bytes, kind, sparse);
    Instruction& out = d.out;
    out.number[Rows] = m, out.number[Depth] = k, out.number[Types] = (int64_t)a | (int64_t)b << 8;
    out.number[Sums] = (int64_t)kind, out.number[Flags] = flags;
    if (sparse) {
        out.slot[4] = d.read(4, B32);
        out.number[Selector] = d.integer(5);
        if (a == Element::B1 || (uint64_t)out.number[Selector] >= selectors(a, k))
            d.unsupported("this sparsity selector");
    }
    out.run = multiply;
}

}  // namespace

Table mma_instructions() {
    return {
        {"mma", "9.7.14.5.14", [](Decoder& d) { decode(d, false, false); }},
        {"mma.sp", "9.7.14.6.3", [](Decoder& d) { decode(d, true, false); }},
        {"mma.sp::ordered_metadata", "9.7.14.6.3", [](Decoder& d) { decode(d, true, true); }},
    };
}

}  // namespace ptx
