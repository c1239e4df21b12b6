// What the forward and the backward scan share: the argument structs of the C ABI, packed parameters, row access.
//
// Legend: B batch, L tokens, E channels, N states, R rank of the low-rank step size, W lanes.  Tensors are channel-last
// [B, L, E]; lanes hold W neighbouring channels, the states are an unrolled loop.  A "walk" visits the tokens from the first
// to the last, or from the last to the first when the direction is reversed: k counts tokens in walk order.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace {

// ---- C ABI: every field is 8 bytes wide, in the order that the Python loader packs them ---------------------------------

struct ScanShape {
  int64_t batch, length, channels, states;
  int64_t dt_rank;  // 0: dt is [B, L, E]; otherwise dt is [B, L, R] and dt_weight [E, R] is given
  int64_t softplus, bfloat16, threads;
};

struct Direction {
  const void *x, *dt, *B, *C;                      // storage type; last dimension contiguous
  const float *A, *D, *dt_weight, *dt_bias;        // [E, N], [E], [E, R], [E]; contiguous; all but A may be null
  int64_t x_batch, x_row, dt_batch, dt_row, B_batch, B_row, C_batch, C_row;  // strides in elements
  int64_t reverse;
};

struct ForwardArgs {
  ScanShape shape;
  Direction dir[2];
  int64_t directions;
  const void *z;  // gate [B, L, E] or null
  int64_t z_batch, z_row;
  double scale;
  void *out, *y_sum;  // [B, L, E] contiguous; y_sum (sum of the directions before gate and scale) may be null
  float *score;       // [B, L] or null: max over channels of y_sum
  float *states;      // or null: state at the start of every chunk but the first
  const float *packed;  // what scan_pack made of the parameters of all directions, or null: packed in the call
};

struct DirectionGrad {
  void *dx;                     // [B, L, E] contiguous
  void *ddt, *dB, *dC;          // rows of E or R, N, N elements; batch stride = L * row stride
  int64_t ddt_row, dB_row, dC_row;
  float *dA, *dD, *ddt_weight, *ddt_bias;  // contiguous like the parameters, null where those are null
};

struct BackwardArgs {
  ScanShape shape;
  Direction dir[2];
  int64_t directions;
  const void *z;
  int64_t z_batch, z_row;
  double scale;
  const void *grad;
  int64_t grad_batch, grad_row;
  const void *y_sum;    // [B, L, E] contiguous; may be null for one direction: y is then recomputed when z is given
  const float *states;  // as written by the forward pass with the same shape, or null: recomputed
  DirectionGrad out[2];
  void *dz;  // [B, L, E] contiguous
};

// ---- chunks -----------------------------------------------------------------------------------------------------------

constexpr int MAX_CHUNK = 32;  // tokens whose step sizes (and in the backward pass states) are held in cache together

struct Chunks {
  int64_t count;
  int size;
  // Equal chunks: 50 tokens become 25 + 25 rather than 32 + 18, which keeps the buffers of the backward pass small.
  explicit Chunks(int64_t length) : count((length + MAX_CHUNK - 1) / MAX_CHUNK) {
    count = std::max<int64_t>(count, 1);
    size = (int)std::max<int64_t>((length + count - 1) / count, 1);
    count = std::max<int64_t>((length + size - 1) / size, 1);
  }
};

// The forward and the backward pass pad to the same number of states: saved states have one layout.
constexpr int states_per_pass(int64_t states) { return W == 16 && states > 8 ? 16 : 8; }

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class S> const S *row_at(const void *base, int64_t batch_stride, int64_t row_stride, int64_t b, int64_t l) {
  return (const S *)base + b * batch_stride + l * row_stride;
}

struct Walk {
  int64_t length;
  bool reverse;
  int64_t token(int64_t k) const { return reverse ? length - 1 - k : k; }
  int64_t step() const { return reverse ? -1 : 1; }
};

// ---- parameters in lane order -------------------------------------------------------------------------------------------

// Per direction and channel block: A * log2(e) as [states][W], dt_weight transposed as [rank][W], D, dt_bias and the limit
// of the step sizes as [W].  Missing lanes, states and ranks are zero.
class PackedParameters {
 public:
  PackedParameters(const ScanShape &s, const Direction *dir, int64_t directions, int threads, const float *packed = nullptr)
      : blocks(round_up(s.channels, W) / W), states(round_up(s.states, states_per_pass(s.states))),
        rank(round_up(s.dt_rank, 4)), stride_(states + rank + 3),
        made_(packed ? 0 : directions * blocks * stride_), data_(packed ? (const vf *)packed : made_.get()) {
    if (!packed) pack(s, dir, directions, threads, made_.get());
  }
  // Vectors that `directions` directions take.
  static int64_t size(const ScanShape &s, int64_t directions) {
    return directions * (round_up(s.channels, W) / W) *
           (round_up(s.states, states_per_pass(s.states)) + round_up(s.dt_rank, 4) + 3);
  }
  void pack(const ScanShape &s, const Direction *dir, int64_t directions, int threads, vf *out) const {
    parallel_static(directions * blocks, threads, [&](int, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) pack_block(s, dir[i / blocks], i % blocks, out + i * stride_);
    });
  }
  const vf *A2(int d, int64_t block) const { return at(d, block); }
  const vf *dt_weight(int d, int64_t block) const { return at(d, block) + states; }
  vf D(int d, int64_t block) const { return at(d, block)[states + rank]; }
  vf bias(int d, int64_t block) const { return at(d, block)[states + rank + 1]; }
  // Step sizes up to this limit keep |dt * A * log2(e)| <= 126, the range of the unclamped exponential; negative where A is
  // not finite, so that none does.
  vf dt_limit(int d, int64_t block) const { return at(d, block)[states + rank + 2]; }

  const int64_t blocks, states, rank;

 private:
  const vf *at(int d, int64_t block) const { return data_ + (d * blocks + block) * stride_; }

  void pack_block(const ScanShape &s, const Direction &dir, int64_t block, vf *out) const {
    memset(out, 0, stride_ * sizeof(vf));
    float *values = (float *)out, largest = 0.f;
    bool finite = true;
    for (int64_t lane = 0; lane < W && block * W + lane < s.channels; lane++) {
      const int64_t channel = block * W + lane;
      for (int64_t n = 0; n < s.states; n++) {
        const float a = dir.A[channel * s.states + n] * LOG2E;
        values[n * W + lane] = a;
        largest = std::max(largest, a < 0 ? -a : a);
        finite = finite && a - a == 0.f;
      }
      for (int64_t r = 0; r < s.dt_rank; r++)
        values[(states + r) * W + lane] = dir.dt_weight[channel * s.dt_rank + r];
      if (dir.D) values[(states + rank) * W + lane] = dir.D[channel];
      if (dir.dt_bias) values[(states + rank + 1) * W + lane] = dir.dt_bias[channel];
    }
    out[states + rank + 2] = splat(!finite ? -1.f : largest > 0.f ? 126.f / largest : 1e30f);
  }

  const int64_t stride_;
  const Buffer<vf> made_;
  const vf *const data_;
};

// ---- small rows (B, C, low-rank dt) as float32 ----------------------------------------------------------------------------

struct Rows {
  const float *p;
  int64_t stride;  // in walk order, negative for a reversed walk
};

// float32 rows of a suitable length are read where they are, others are converted and zero-padded to `padded` columns.
template <class S>
Rows small_rows(const S *first, int64_t stride, int columns, int64_t padded, int m, float *buffer, bool copy) {
  if constexpr (sizeof(S) == sizeof(float)) {
    if (!copy && columns == padded) return {first, stride};
  }
  for (int k = 0; k < m; k++) {
    float *out = buffer + k * padded;
    for (int i = 0; i < columns; i++) out[i] = scalar(first[k * stride + i]);
    for (int64_t i = columns; i < padded; i++) out[i] = 0.f;
  }
  return {buffer, padded};
}

// Missing lanes are zero in every input, but zero times infinity is not: what is made of the small rows is cleared there.
MS_INLINE void clear_missing(vf *v, int64_t count, int lanes) {
  if (lanes == W) return;
  const vi missing = missing_lanes(lanes);
  for (int64_t i = 0; i < count; i++) v[i] = missing ? (vf){} : v[i];
}

// raw[k] = bias + dt_low[k] . dt_weight for the m tokens of a chunk (before softplus).
MS_INLINE void project_dt(vf *raw, int m, vf bias, const vf *weight, int rank, Rows low) {
  constexpr int TILE = W == 16 ? 8 : 4;  // independent sums hide the latency of the multiply-add
  int k = 0;
  for (; k + TILE <= m; k += TILE) {
    vf s[TILE];
    for (int j = 0; j < TILE; j++) s[j] = bias;
    const float *p = low.p + k * low.stride;
    for (int r = 0; r < rank; r++) {
      const vf w = weight[r];
#pragma GCC unroll 8
      for (int j = 0; j < TILE; j++) s[j] = w * p[j * low.stride + r] + s[j];
    }
    for (int j = 0; j < TILE; j++) raw[k + j] = s[j];
  }
  for (; k < m; k++) {
    vf s = bias;
    for (int r = 0; r < rank; r++) s = weight[r] * low.p[k * low.stride + r] + s;
    raw[k] = s;
  }
}

}  // namespace
