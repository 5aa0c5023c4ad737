// Operands of matrix instructions as numbers, and their product. Everything is built from core matrices, 8 rows of 16
// bytes: one 32-bit register of a warp (lane 4 * row + column / 4 holds 4 bytes), one matrix of ldmatrix, and what
// wgmma's layouts in shared memory are made of.
#pragma once
#include <cmath>
#include <cstring>

#include "decoder.h"
#include "numbers.h"

namespace ptx {

enum class Element { F16, BF16, TF32, E4M3, E5M2, S8, U8, S4, U4, B1 };
enum class Sum { F32, F16, S32, S32Saturated };      // accumulators; F16 is held as a float that has that precision

constexpr unsigned CORE_ROWS = 8, CORE_ROW_BYTES = 16, CORE_BYTES = 128;

Element element_named(Decoder& decoder, const std::string& name);
unsigned bits_of(Element element);
inline unsigned core_width(Element element) { return 8 * CORE_ROW_BYTES / bits_of(element); }   // its columns
inline bool is_integer(Element element) { return element >= Element::S8; }
Sum sum_of(Decoder& decoder, const std::string& type, Element a, Element b);   // checks that the three fit

#if defined(__AVX512F__)
constexpr unsigned VECTOR = 8;                       // doubles of a register of the host
#elif defined(__AVX__)
constexpr unsigned VECTOR = 4;
#else
constexpr unsigned VECTOR = 2;
#endif

// A [rows, kept] times B [depth, columns]. Where A is sparse, index says which row of B each of its values meets.
struct Product {
    static constexpr unsigned MOST_A = 64 * 32, MOST_B = 256 * 64;
    typedef double Vector __attribute__((vector_size(8 * VECTOR), may_alias));
    struct Eight {                                   // one row of 8 columns
        Vector part[8 / VECTOR];
        void add(double x, const Eight& y) {
            for (unsigned i = 0; i < 8 / VECTOR; i++) part[i] += x * y.part[i];
        }
    };

    unsigned rows, columns, depth, kept;
    Element a_element, b_element;
    bool sparse = false, exclusive = false;          // exclusive: bits are counted in a ^ b, not in a & b
    alignas(64) double a[MOST_A];                    // [rows / 8][kept / width][8][width]: core matrices
    alignas(64) double b[MOST_B];                    // [columns / 8][depth][8]
    uint8_t index[MOST_A];                           // as a
    uint64_t a_bits[64][4], b_bits[256][4];          // of Element::B1, instead of a and b

    static Product& scratch();                       // one for the thread
    void shape(unsigned m, unsigned n, unsigned k, Element of_a, Element of_b, bool is_sparse);
    // One core matrix: 8 rows of A or 8 columns of B, and 16 bytes along k.
    void set_a(const uint8_t* core, unsigned row_block, unsigned k_block);
    void set_b(const uint8_t* core, unsigned column_block, unsigned k_block);
    // The same where the 16 bytes lie along m or n, and the 8 rows along k; 16-bit elements.
    void set_a_transposed(const uint8_t* core, unsigned row_block, unsigned k_block);
    void set_b_transposed(const uint8_t* core, unsigned column_block, unsigned k_block);
    unsigned place_in_a(unsigned row, unsigned k) const {
        unsigned width = core_width(a_element);
        return row / 8 * 8 * kept + k / width * 8 * width + row % 8 * width + k % width;
    }
    void negate_a();
    void negate_b();

    // Adds the product to accumulators: words(row, column_block) is the place of 8 that lie side by side.
    template <class Words> void add_to(Sum kind, Words words) const;

  private:
    template <Sum kind, class Words> void add(Words words) const;
    static constexpr unsigned TOGETHER = 4;          // rows that share what is read of B
    void multiply(unsigned row, unsigned column_block, double (*out)[8]) const;
    void count_bits(unsigned row, unsigned column_block, double (*out)[8]) const;
};

// The 2:4 metadata of 16 rows of A, as the lanes of a warp hold it (mma.sp and wgmma.sp).
// ordered: refuse what mma.sp::ordered_metadata and wgmma do not define.
void set_index(Product& product, const uint32_t* metadata, unsigned selector, unsigned first_row, bool ordered);
unsigned selectors(Element element, unsigned depth); // how many values the sparsity selector may have

float round_to_half(double value);

// 64 words of a core matrix of accumulators to and from registers. Two 32-bit registers hold one: lane 4 * row +
// column / 2 has columns 2c and 2c + 1; 16-bit ones lie in pairs in one register. Every NaN is stored as the same one.
void load_sums(Sum kind, uint32_t* words, const uint32_t* first, const uint32_t* second);
void store_sums(Sum kind, const uint32_t* words, uint32_t* first, uint32_t* second);

// Products are exact and summed in double over one instruction, the accumulator joins them there, and the result is
// rounded once: at least as exact as the hardware, which cuts off low bits of the smaller products.
template <Sum kind> inline void accumulate(uint32_t* words, const double* sums) {
    if constexpr (kind == Sum::F32 || kind == Sum::F16) {
        float values[8];
        memcpy(values, words, sizeof values);
        for (unsigned c = 0; c < 8; c++) {
            double total = sums[c] + (double)values[c];
            values[c] = kind == Sum::F32 ? (float)total : round_to_half(total);
        }
        memcpy(words, values, sizeof values);
    } else {
        for (unsigned c = 0; c < 8; c++) {
            int64_t total = (int64_t)sums[c] + (int32_t)words[c];
            if (kind == Sum::S32Saturated) total = std::min<int64_t>(std::max<int64_t>(total, INT32_MIN), INT32_MAX);
            words[c] = (uint32_t)total;
        }
    }
}

template <Sum kind, class Words> void Product::add(Words words) const {
    for (unsigned block = 0; block < columns / 8; block++)
        for (unsigned row = 0; row < rows; row += TOGETHER) {
            double sums[TOGETHER][8];
            if (a_element == Element::B1) count_bits(row, block, sums);
            else multiply(row, block, sums);
            for (unsigned r = 0; r < TOGETHER; r++) accumulate<kind>(words(row + r, block), sums[r]);
        }
}

inline void Product::multiply(unsigned row, unsigned column_block, double (*out)[8]) const {
    const Eight* panel = reinterpret_cast<const Eight*>(b) + column_block * depth;
    const double* of_a = a + place_in_a(row, 0);
    const uint8_t* at = index + place_in_a(row, 0);
    unsigned width = core_width(a_element), step = CORE_ROWS * width;
    Eight sums[TOGETHER] = {};
    if (sparse) {
        for (unsigned k = 0; k < kept; k += width, of_a += step, at += step)
            for (unsigned c = 0; c < width; c++)
                for (unsigned r = 0; r < TOGETHER; r++) sums[r].add(of_a[r * width + c], panel[at[r * width + c]]);
    } else {
        for (unsigned k = 0; k < kept; k += width, of_a += step)
            for (unsigned c = 0; c < width; c++)
                for (unsigned r = 0; r < TOGETHER; r++) sums[r].add(of_a[r * width + c], panel[k + c]);
    }
    memcpy(out, sums, sizeof sums);
}

template <class Words> void Product::add_to(Sum kind, Words words) const {
    switch (kind) {
    case Sum::F32: return add<Sum::F32>(words);
    case Sum::F16: return add<Sum::F16>(words);
    case Sum::S32: return add<Sum::S32>(words);
    case Sum::S32Saturated: return add<Sum::S32Saturated>(words);
    }
}

}  // namespace ptx
