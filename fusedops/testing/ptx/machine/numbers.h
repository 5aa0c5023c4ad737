// Number formats narrower than double: their bits from numbers and back, with every rounding of PTX.
#pragma once
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace ptx {

template <class To, class From> inline To bit_cast(From value) {
    static_assert(sizeof(To) == sizeof(From), "the same width");
    To bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

enum class Rounding { NearestEven, Zero, Down, Up, NearestAway };

// The rounding of float and double arithmetic while it lives. What is computed must be loaded from memory after it
// began and stored before it ends: then no compiler moves the arithmetic out.
class RoundTo {
  public:
    explicit RoundTo(Rounding rounding) : before_(fegetround()) {
        fesetround(rounding == Rounding::Zero ? FE_TOWARDZERO : rounding == Rounding::Down ? FE_DOWNWARD
                   : rounding == Rounding::Up ? FE_UPWARD : FE_TONEAREST);
        asm volatile("" ::: "memory");
    }
    ~RoundTo() {
        asm volatile("" ::: "memory");
        fesetround(before_);
    }
    RoundTo(const RoundTo&) = delete;

  private:
    int before_;
};

// A format with a sign, EXPONENT bits and MANTISSA bits. Without infinities only the pattern of all ones is a NaN.
template <unsigned EXPONENT, unsigned MANTISSA, bool INFINITIES = true> struct Format {
    static constexpr unsigned BITS = 1 + EXPONENT + MANTISSA;
    static constexpr int LOWEST = 2 - (1 << (EXPONENT - 1));              // exponent of the least normal number
    static constexpr uint32_t SIGN = 1u << (BITS - 1), NOT_A_NUMBER = SIGN - 1;
    static constexpr uint32_t INFINITE = INFINITIES ? ((1u << EXPONENT) - 1) << MANTISSA : NOT_A_NUMBER;
    static constexpr uint32_t LARGEST = INFINITE - 1;

    // `finite`: numbers past the largest, infinities too, become the largest.
    static uint32_t encode(double number, Rounding rounding = Rounding::NearestEven, bool finite = false) {
        uint64_t bits = bit_cast<uint64_t>(number), magnitude = bits & ~0ull >> 1;
        bool negative = bits >> 63;
        uint32_t sign = negative ? SIGN : 0;
        if (magnitude > 0x7FFull << 52) return NOT_A_NUMBER;
        int exponent = (int)(magnitude >> 52) - 1023;
        uint64_t mantissa = (magnitude & ((1ull << 52) - 1)) | (uint64_t)(exponent > -1023) << 52;
        int shift = 52 - (int)MANTISSA + (exponent < LOWEST ? LOWEST - exponent : 0);
        if (shift > 63) shift = 63;
        uint64_t kept = mantissa >> shift, rest = mantissa & ((1ull << shift) - 1), half = 1ull << (shift - 1);
        bool up = rounding == Rounding::NearestEven ? rest > half || (rest == half && (kept & 1))
                  : rounding == Rounding::NearestAway ? rest >= half
                  : rounding == Rounding::Up ? rest && !negative
                  : rounding == Rounding::Down ? rest && negative : false;
        uint64_t result = kept + up + ((uint64_t)(exponent > LOWEST ? exponent - LOWEST : 0) << MANTISSA);
        if (result < INFINITE) return sign | (uint32_t)result;
        bool infinite = magnitude == 0x7FFull << 52;
        bool toward_zero = rounding == Rounding::Zero || (rounding == Rounding::Up && negative) ||
                           (rounding == Rounding::Down && !negative);
        return sign | (finite || (toward_zero && !infinite) ? LARGEST : INFINITE);
    }

    static float decode(uint32_t bits) {
        uint32_t magnitude = bits & NOT_A_NUMBER, sign = (bits & SIGN) << (32 - BITS);
        // The exponent's field is read with float's bias and then put right, so subnormal numbers need no case.
        float scale = bit_cast<float>((uint32_t)(126 + LOWEST + 127) << 23);
        float scaled = bit_cast<float>(magnitude << (23 - MANTISSA)) * scale;
        uint32_t number = bit_cast<uint32_t>(scaled) | sign;
        if (INFINITIES && magnitude == INFINITE) number = sign | 0x7F800000;
        return bit_cast<float>(magnitude > LARGEST && !(INFINITIES && magnitude == INFINITE) ? 0x7FFFFFFF : number);
    }
};
using FormatF16 = Format<5, 10>;
using FormatBF16 = Format<8, 7>;
using FormatTF32 = Format<8, 10>;                     // in the upper 19 bits of a register
using FormatE4M3 = Format<4, 3, false>;
using FormatE5M2 = Format<5, 2>;

// The results of float arithmetic have one NaN only.
inline float canonical(float x) { return x != x ? bit_cast<float>(0x7FFFFFFFu) : x; }
inline double canonical(double x) { return x; }

// The common conversions, written so that loops over lanes become vectors.
inline float from_f16(uint16_t bits) {
    uint32_t magnitude = bits & 0x7FFF, sign = (uint32_t)(bits & 0x8000) << 16;
    uint32_t number = bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f);
    number |= magnitude >= 0x7C00 ? 0x7F800000u : 0u;
    return bit_cast<float>(magnitude > 0x7C00 ? 0x7FFFFFFFu : number | sign);
}
inline uint16_t to_f16(float number) {                // to nearest even
    uint32_t bits = bit_cast<uint32_t>(number), magnitude = bits & 0x7FFFFFFF;
    uint32_t normal = (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    // Near 0.5 the last place of a float is the least subnormal f16, so this addition rounds as it should.
    uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000;
    uint32_t result = magnitude < 0x38800000 ? subnormal : magnitude < 0x47800000 ? normal : 0x7C00;
    return magnitude > 0x7F800000 ? 0x7FFF : (uint16_t)(result | (bits >> 16 & 0x8000));
}
inline float from_bf16(uint16_t bits) { return canonical(bit_cast<float>((uint32_t)bits << 16)); }
inline uint16_t to_bf16(float number) {               // to nearest even
    uint32_t bits = bit_cast<uint32_t>(number);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FFF : (uint16_t)rounded;
}
inline float from_e4m3(uint8_t bits) { return FormatE4M3::decode(bits); }
inline float from_e5m2(uint8_t bits) { return FormatE5M2::decode(bits); }
inline float from_tf32(uint32_t bits) { return bit_cast<float>(bits & 0xFFFFE000); }   // what the tensor cores read

// a + b, of which the last place tells whether anything was lost: rounding this to fewer bits is rounding once.
inline double add_to_odd(double a, double b) {
    double sum = a + b, part = sum - a, lost = (a - (sum - part)) + (b - part);
    int64_t bits = bit_cast<int64_t>(sum);
    int64_t step = (lost > 0) == (sum > 0) ? 1 : -1;
    return bit_cast<double>(bits + (std::fabs(lost) > 0 && !(bits & 1) ? step : 0));
}

}  // namespace ptx
