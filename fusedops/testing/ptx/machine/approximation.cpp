// The approximations of f32 and f64. PTX ISA 9.7.3. Results here are rounded from double, closer than PTX asks for;
// what it documents as the largest error stands with each entry.
#include "floats.h"

namespace ptx {

namespace {

template <class T> using Function = T (*)(T);

template <class T, Function<T> f, bool ftz> T approximate(T x) { return finish<ftz, false>(f(start<ftz>(x))); }

template <Function<float> f> void of_float(Decoder& d) {
    d.ignore({"approx"});
    bool ftz = d.has("ftz");
    Type type = d.type();
    if (!type.is(Type::Float, 4)) d.unsupported("f32 was expected");
    same_type(d, type, 1);
    using T = float;
    d.out.run = ftz ? unary<T, T, approximate<T, f, true>> : unary<T, T, approximate<T, f, false>>;
}

float reciprocal(float x) { return 1 / x; }
float root(float x) { return std::sqrt(x); }
float reciprocal_root(float x) { return (float)(1 / std::sqrt((double)x)); }
float sine(float x) { return (float)std::sin((double)x); }
float cosine(float x) { return (float)std::cos((double)x); }
float logarithm(float x) { return (float)std::log2((double)x); }

// ---- div: a * (1 / b), so .approx has no quotient for divisors whose reciprocal is subnormal
template <bool ftz, bool full> float quotient(float a, float b) {
    a = start<ftz>(a), b = start<ftz>(b);
    bool huge = !full && std::fabs(b) > 0x1p126f && std::fabs(b) < INFINITY;
    float nothing = std::isinf(a) ? NAN : std::copysign(0.0f, std::signbit(a) == std::signbit(b) ? 1.0f : -1.0f);
    return finish<ftz, false>(huge && a == a ? nothing : a / b);
}

// ---- f64: only the upper half of the result's bits is computed
double upper_half(double x) { return bit_cast<double>(bit_cast<uint64_t>(x) & 0xFFFFFFFF00000000); }
double flush64(double x) { return std::fabs(x) < 0x1p-1022 ? std::copysign(0.0, x) : x; }
double reciprocal64(double x) { return upper_half(flush64(1 / flush64(x))); }
double reciprocal_root64(double x) { return upper_half(1 / std::sqrt(flush64(x))); }

template <Function<float> narrow, Function<double> wide> void of_both(Decoder& d) {
    if (d.statement.name.back() == "f32") return of_float<narrow>(d);
    d.ignore({"approx", "ftz"});
    Type type = d.type();
    same_type(d, type, 1);
    d.out.run = unary<double, double, wide>;
}

}  // namespace

float two_to(float x) {
    // 2^x = 2^n * 2^f with n whole and |f| <= 1/2; the series of 2^f is exact to 10^-12.
    double bounded = x < 200 ? x > -200 ? x : -200 : 200;
    double shifted = bounded + 0x1.8p52, f = bounded - (shifted - 0x1.8p52);
    double series = 1 + f * (0.6931471805599453 + f * (0.2402265069591007 + f * (0.05550410866482158
        + f * (0.009618129107628477 + f * (0.0013333558146428443 + f * (0.0001540353039338161
        + f * (1.5252733804059840e-05 + f * (1.3215486790144307e-06 + f * 1.0178086009239699e-07))))))));
    uint64_t exponent = (bit_cast<uint64_t>(shifted) + 1023) << 52;
    float result = (float)(series * bit_cast<double>(exponent));
    return x != x ? x : result;
}

float hyperbolic_tangent(float x) { return (float)std::tanh((double)x); }

void approximate_div(Decoder& d) {
    bool full = d.statement.name[1] == "full", ftz = d.has("ftz");
    Type type = d.type();
    if (!type.is(Type::Float, 4)) d.unsupported("f32 was expected");
    same_type(d, type, 2);
    d.out.run = full ? ftz ? binary<float, float, quotient<true, true>> : binary<float, float, quotient<false, true>>
                     : ftz ? binary<float, float, quotient<true, false>> : binary<float, float, quotient<false, false>>;
}

void approximate_rcp(Decoder& d) { of_both<reciprocal, reciprocal64>(d); }
void approximate_sqrt(Decoder& d) { of_float<root>(d); }

Table approximation_instructions() {
    return {
        {"rsqrt", "9.7.3.16", of_both<reciprocal_root, reciprocal_root64>},       // 2^-22.9; f64: 2^-22.4
        {"sin", "9.7.3.18", of_float<sine>},                                      // 2^-20.5 for |x| <= pi
        {"cos", "9.7.3.19", of_float<cosine>},                                    // 2^-20.5 for |x| <= pi
        {"lg2", "9.7.3.20", of_float<logarithm>},                                 // 2^-22
        {"ex2", "9.7.3.21", of_float<two_to>, Of::Floats},                        // 2^-22, and 2^-22.5 for [0, 1]
        {"tanh", "9.7.3.22", of_float<hyperbolic_tangent>, Of::Floats},           // 2^-11
    };
}

}  // namespace ptx
