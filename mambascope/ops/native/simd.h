// Portable SIMD layer: GCC/Clang vector extensions with the lane count W taken from the instruction set of the build.
//
// Everything is float32 inside; `bf16` is a storage type only.  Intrinsics appear only where the extensions cannot name an
// operation (min/max without a compare, any-lane tests) and always behind an ISA check.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define MS_INLINE static inline __attribute__((always_inline))
#define MS_NOINLINE static __attribute__((noinline))

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef float vf_unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(2 * W), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};

MS_INLINE vf splat(float x) { return x - (vf){}; }

// ---- loads and stores -------------------------------------------------------------------------------------------------

MS_INLINE vf load(const float *p) { return *(const vf_unaligned *)p; }
MS_INLINE vf load(const bf16 *p) { return (vf)(__builtin_convertvector(*(const vh_unaligned *)p, vu) << 16); }
MS_INLINE void store(float *p, vf v) { *(vf_unaligned *)p = v; }
MS_INLINE void store(bf16 *p, vf v) {
  const vu u = (vu)v, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // nearest even, like torch
  const vu quiet = (u >> 16) | 0x40u;                                   // a NaN must not be rounded to infinity
  *(vh_unaligned *)p = __builtin_convertvector((vu)(v == v ? (vi)rounded : (vi)quiet), vh);
}

MS_INLINE float scalar(float x) { return x; }
MS_INLINE float scalar(bf16 x) {
  const uint32_t u = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

// The last channel block of a row may hold fewer than W lanes: missing lanes read as zero and are never written.
template <class S> MS_INLINE vf load_lanes(const S *p, int lanes) {
  if (__builtin_expect(lanes == W, 1)) return load(p);
  S tmp[W] = {};
  for (int i = 0; i < lanes; i++) tmp[i] = p[i];
  return load(tmp);
}
template <class S> MS_INLINE void store_lanes(S *p, vf v, int lanes) {
  if (__builtin_expect(lanes == W, 1)) {
    store(p, v);
    return;
  }
  S tmp[W];
  store(tmp, v);
  for (int i = 0; i < lanes; i++) p[i] = tmp[i];
}

// ---- elementwise functions --------------------------------------------------------------------------------------------

// The second operand where either is NaN, as the machine's instructions have it: a NaN passes a limit that stands first.
#if defined(__AVX512F__)
MS_INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
MS_INLINE vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
MS_INLINE bool any_lane(vi m) { return _mm512_test_epi32_mask((__m512i)m, (__m512i)m) != 0; }
#elif defined(__AVX2__)
MS_INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
MS_INLINE vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
MS_INLINE bool any_lane(vi m) { return _mm256_movemask_ps((__m256)m) != 0; }
#else
MS_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
MS_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
MS_INLINE bool any_lane(vi m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
#endif
MS_INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }
MS_INLINE vi not_finite(vf a) { return ~(vi)(a - a == (vf){}); }
// All bits set in the lanes from `lanes` on, those beyond the last channel.
MS_INLINE vi missing_lanes(int lanes) {
  vi m;
  for (int i = 0; i < W; i++) m[i] = i < lanes ? 0 : -1;
  return m;
}

constexpr float LOG2E = 1.44269504088896340736f;
constexpr float ROUND_MAGIC = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer kept in the low mantissa bits

// 2^(a*b), relative error 9e-8.  The polynomial has p(0) = 1 exactly: a biased decay near 1 would add up over the sequence.
// Without CLAMP the caller guarantees |a*b| <= 126 (the exponent is added as an integer).  With it the exponents at the
// limits give exactly 0 and infinity.  NaN needs KEEP_NAN: the payload of some would be added to their exponent.
template <bool CLAMP, bool KEEP_NAN = CLAMP> MS_INLINE vf exp2_product(vf a, vf b) {
  vf t, f, x;
  if (CLAMP) {
    x = vmin(splat(128.f), vmax(splat(-127.f), a * b));
    t = x + ROUND_MAGIC;
    f = x - (t - ROUND_MAGIC);
  } else {
    t = a * b + ROUND_MAGIC;
    f = a * b - (t - ROUND_MAGIC);
  }
  vf p = splat(1.326472727e-03f);
  p = p * f + 9.671512756e-03f;
  p = p * f + 5.550733744e-02f;
  p = p * f + 2.402224208e-01f;
  p = p * f + 6.931469776e-01f;
  p = p * f + 1.0f;
  const vf scaled = (vf)((vi)p + ((vi)t << 23));
  return KEEP_NAN ? (x == x ? scaled : x) : scaled;
}
// Of no NaN: what follows is added to or multiplied by x itself, which keeps it.
MS_INLINE vf exp_clamped(vf x) { return exp2_product<true, false>(x, splat(LOG2E)); }

// max(x, 0) + log1p(exp(-|x|)); log1p as t*q(t) keeps small step sizes accurate in the relative sense.
MS_INLINE vf softplus(vf x) {
  const vf t = exp_clamped(-vabs(x));
  vf p = splat(5.232695142e-03f);
  p = p * t - 2.950524478e-02f;
  p = p * t + 7.822596641e-02f;
  p = p * t - 1.366324753e-01f;
  p = p * t + 1.910600788e-01f;
  p = p * t - 2.484298261e-01f;
  p = p * t + 3.331909688e-01f;
  p = p * t - 4.999949315e-01f;
  p = p * t + 9.999999699e-01f;
  return vmax(splat(0.f), x) + t * p;
}
MS_INLINE vf sigmoid(vf x) { return 1.f / (1.f + exp_clamped(-x)); }
MS_INLINE vf silu(vf x) { return x / (1.f + exp_clamped(-x)); }

// ---- W vectors -> one vector of their W lane reductions -----------------------------------------------------------------

// Merges segments of S lanes of x and y: `high` picks the upper halves of the segments, otherwise the lower halves.
constexpr int merge_index(int lane, int S, bool high) {
  const int half = S / 2, segment = lane / S, within = lane % S;
  return segment * S + (within % half) + (high ? half : 0) + (within >= half ? W : 0);
}
#if defined(__clang__)
template <int S, bool HIGH, int... I> MS_INLINE vf merge(vf x, vf y, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, y, merge_index(I, S, HIGH)...);
}
#else
template <int S, bool HIGH, int... I> MS_INLINE vf merge(vf x, vf y, std::integer_sequence<int, I...>) {
  return __builtin_shuffle(x, y, (vi){merge_index(I, S, HIGH)...});
}
#endif
struct Add {
  MS_INLINE vf apply(vf a, vf b) { return a + b; }
};
struct Max {
  MS_INLINE vf apply(vf a, vf b) { return a == a ? vmax(a, b) : a; }  // NaN if either is
};
template <class Op, int S> MS_INLINE vf reduce_level(vf *v) {
  if constexpr (S == 1) {
    return v[0];
  } else {
    using lanes = std::make_integer_sequence<int, W>;
    for (int i = 0; i < S / 2; i++)
      v[i] = Op::apply(merge<S, false>(v[i], v[i + S / 2], lanes{}), merge<S, true>(v[i], v[i + S / 2], lanes{}));
    return reduce_level<Op, S / 2>(v);
  }
}
// Lane i of the result reduces the lanes of v[i]; v (W vectors) is overwritten.
template <class Op> MS_INLINE vf reduce_lanes(vf *v) { return reduce_level<Op, W>(v); }
MS_INLINE float sum_lanes(vf v) {
  float s = 0.f;
  for (int i = 0; i < W; i++) s += v[i];
  return s;
}

}  // namespace
