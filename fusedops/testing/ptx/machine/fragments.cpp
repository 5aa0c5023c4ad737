// From the bits of core matrices to numbers, and from sums to registers.
#include "fragments.h"

namespace ptx {

namespace {

struct Kind {
    const char* name;
    unsigned bits;
};
constexpr Kind KINDS[] = {{"f16", 16}, {"bf16", 16}, {"tf32", 32}, {"e4m3", 8}, {"e5m2", 8},
                          {"s8", 8},   {"u8", 8},    {"s4", 4},    {"u4", 4},   {"b1", 1}};

struct SmallFloats {
    double e4m3[256], e5m2[256];
    SmallFloats() {
        for (unsigned i = 0; i < 256; i++) e4m3[i] = from_e4m3(i), e5m2[i] = from_e5m2(i);
    }
};

template <class T, class F> void convert(const uint8_t* core, double* out, F f) {
    T values[CORE_BYTES / sizeof(T)];
    memcpy(values, core, CORE_BYTES);
    for (unsigned i = 0; i < CORE_BYTES / sizeof(T); i++) out[i] = f(values[i]);
}

// All elements of a core matrix, row by row.
void unpack(Element element, const uint8_t* core, double* out) {
    static const SmallFloats small;
    switch (element) {
    case Element::F16: return convert<uint16_t>(core, out, from_f16);
    case Element::BF16: return convert<uint16_t>(core, out, from_bf16);
    case Element::TF32: return convert<uint32_t>(core, out, from_tf32);
    case Element::E4M3: return convert<uint8_t>(core, out, [](uint8_t x) { return small.e4m3[x]; });
    case Element::E5M2: return convert<uint8_t>(core, out, [](uint8_t x) { return small.e5m2[x]; });
    case Element::S8: return convert<int8_t>(core, out, [](int8_t x) { return (double)x; });
    case Element::U8: return convert<uint8_t>(core, out, [](uint8_t x) { return (double)x; });
    case Element::S4:
    case Element::U4:
        for (unsigned i = 0; i < 2 * CORE_BYTES; i++) {
            int value = core[i / 2] >> (i % 2 * 4) & 15;
            out[i] = element == Element::S4 && value > 7 ? value - 16 : value;
        }
        return;
    case Element::B1: return;                        // kept as bits
    }
}

template <unsigned width> void transpose(const double* from, double* to) {
    for (unsigned c = 0; c < width; c++)
        for (unsigned r = 0; r < CORE_ROWS; r++) to[c * CORE_ROWS + r] = from[r * width + c];
}

// The same column by column.
void unpack_transposed(Element element, const uint8_t* core, double* out) {
    double values[2 * CORE_BYTES];
    unpack(element, core, values);
    switch (core_width(element)) {
    case 4: return transpose<4>(values, out);
    case 8: return transpose<8>(values, out);
    case 16: return transpose<16>(values, out);
    default: return transpose<32>(values, out);
    }
}

void copy_bits(const uint8_t* core, uint64_t (*rows)[4], unsigned k_block) {
    for (unsigned r = 0; r < CORE_ROWS; r++) memcpy(&rows[r][2 * k_block], core + r * CORE_ROW_BYTES, CORE_ROW_BYTES);
}

}  // namespace

Element element_named(Decoder& decoder, const std::string& name) {
    for (unsigned i = 0; i < std::size(KINDS); i++)
        if (name == KINDS[i].name) return (Element)i;
    decoder.unsupported("." + name);
}

unsigned bits_of(Element element) { return KINDS[(unsigned)element].bits; }

Sum sum_of(Decoder& decoder, const std::string& type, Element a, Element b) {
    bool bytes = a == Element::E4M3 || a == Element::E5M2;
    bool mixed = bits_of(a) == bits_of(b) && is_integer(a) == is_integer(b) && (bytes || is_integer(a));
    if (a != b && !mixed) decoder.unsupported("these types together");
    if (is_integer(a)) {
        if (type != "s32") decoder.unsupported("." + type + " sums of integers");
        return decoder.has("satfinite") ? Sum::S32Saturated : Sum::S32;
    }
    if (type == "f32") return Sum::F32;
    if (type != "f16" || (a != Element::F16 && !bytes)) decoder.unsupported("." + type + " sums of these types");
    return Sum::F16;
}

Product& Product::scratch() {
    static thread_local Product one;
    return one;
}

void Product::shape(unsigned m, unsigned n, unsigned k, Element of_a, Element of_b, bool is_sparse) {
    rows = m, columns = n, depth = k, kept = is_sparse ? k / 2 : k;
    a_element = of_a, b_element = of_b;
    sparse = is_sparse, exclusive = false;
}

void Product::set_a(const uint8_t* core, unsigned row_block, unsigned k_block) {
    if (a_element == Element::B1) return copy_bits(core, a_bits + 8 * row_block, k_block);
    unpack(a_element, core, a + place_in_a(8 * row_block, k_block * core_width(a_element)));
}

void Product::set_b(const uint8_t* core, unsigned column_block, unsigned k_block) {
    if (b_element == Element::B1) return copy_bits(core, b_bits + 8 * column_block, k_block);
    unpack_transposed(b_element, core, b + 8 * (column_block * depth + k_block * core_width(b_element)));
}

void Product::set_a_transposed(const uint8_t* core, unsigned row_block, unsigned k_block) {
    unpack_transposed(a_element, core, a + place_in_a(8 * row_block, 8 * k_block));
}

void Product::set_b_transposed(const uint8_t* core, unsigned column_block, unsigned k_block) {
    unpack(b_element, core, b + 8 * (column_block * depth + 8 * k_block));
}

void Product::negate_a() {
    for (unsigned i = 0; i < rows * kept; i++) a[i] = -a[i];
}

void Product::negate_b() {
    for (unsigned i = 0; i < columns * depth; i++) b[i] = -b[i];
}

void Product::count_bits(unsigned row, unsigned column_block, double (*out)[8]) const {
    for (unsigned i = 0; i < TOGETHER * 8; i++) {
        const uint64_t *x = a_bits[row + i / 8], *y = b_bits[8 * column_block + i % 8];
        unsigned count = 0;
        for (unsigned word = 0; word < depth / 64; word++)
            count += __builtin_popcountll(exclusive ? x[word] ^ y[word] : x[word] & y[word]);
        out[i / 8][i % 8] = count;
    }
}

float round_to_half(double value) {
    if (!(std::fabs(value) < 65520)) return std::isnan(value) ? NAN : std::copysign(INFINITY, (float)value);
    uint64_t bits, shift;
    memcpy(&bits, &value, 8);
    int exponent = std::max<int>(bits >> 52 & 0x7FF, 1023 - 14);    // subnormals share the lowest one
    shift = (uint64_t)(exponent + 42) << 52 | 1ull << 51;           // its lowest bit is worth 2^-10 of the leading one
    double large;
    memcpy(&large, &shift, 8);
    return (float)std::copysign((value + large) - large, value);
}

void load_sums(Sum kind, uint32_t* words, const uint32_t* first, const uint32_t* second) {
    for (unsigned lane = 0; lane < LANES; lane++) {
        if (kind == Sum::F16) {
            words[2 * lane] = bit_cast<uint32_t>(from_f16(first[lane]));
            words[2 * lane + 1] = bit_cast<uint32_t>(from_f16(first[lane] >> 16));
        } else {
            words[2 * lane] = first[lane], words[2 * lane + 1] = second[lane];
        }
    }
}

void store_sums(Sum kind, const uint32_t* words, uint32_t* first, uint32_t* second) {
    auto number = [](uint32_t word) { return bit_cast<float>(word); };
    auto one_nan = [=](uint32_t word) { return bit_cast<uint32_t>(canonical(number(word))); };
    for (unsigned lane = 0; lane < LANES; lane++) {
        uint32_t low = words[2 * lane], high = words[2 * lane + 1];
        if (kind == Sum::F16) first[lane] = to_f16(number(low)) | (uint32_t)to_f16(number(high)) << 16;
        else if (kind == Sum::F32) first[lane] = one_nan(low), second[lane] = one_nan(high);
        else first[lane] = low, second[lane] = high;
    }
}

}  // namespace ptx
