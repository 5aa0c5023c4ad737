// What the files about f32 and f64 share: subnormal inputs, and what becomes of a result.
#pragma once
#include "numbers.h"
#include "pick.h"

namespace ptx {

inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

template <bool ftz, class T> inline T start(T x) {
    if constexpr (ftz && sizeof(T) == 4) return flush(x);
    else return x;
}
// .ftz, .sat (to [0, 1], NaN to +0) and the only NaN that f32 results have.
template <bool ftz, bool sat, class T> inline T finish(T x) {
    x = canonical(start<ftz>(x));
    if (sat) return x > 0 ? x < 1 ? x : 1 : 0;
    return x;
}

inline Rounding rounding_of(const std::string& name) {                // "", "rn" or "rni": to nearest even
    if (name == "rz" || name == "rzi") return Rounding::Zero;
    if (name == "rm" || name == "rmi") return Rounding::Down;
    if (name == "rp" || name == "rpi") return Rounding::Up;
    return name == "rna" ? Rounding::NearestAway : Rounding::NearestEven;
}

// approximation.cpp; .approx or .full has been asked for already.
void approximate_div(Decoder& d);
void approximate_rcp(Decoder& d);
void approximate_sqrt(Decoder& d);

float two_to(float x);                                // 2^x, correctly rounded but for some of 10^9 arguments
float hyperbolic_tangent(float x);

}  // namespace ptx
