// RMSNorm of a residual stream kept in float32, with the residual addition.
#pragma once

#include <cmath>

#include "parallel.h"
#include "simd.h"

namespace {

struct NormArgs {
  int64_t rows, width, threads;
  int64_t hidden_bfloat16, normed_bfloat16;
  double eps;
  const void *hidden;     // [rows, width]
  const float *residual;  // [rows, width] or null
  const float *weight;    // [width]
  void *normed;
  float *sum, *rstd;  // residual + hidden [rows, width], 1 / rms [rows]
  // backward only
  const void *grad;         // of normed
  const float *grad_sum;    // of sum, or null
  float *dsum, *dweight;    // gradient of both addends, gradient of weight
};

MS_INLINE int lanes_at(int64_t i, int64_t width) { return (int)std::min<int64_t>(W, width - i); }

template <class H, class O> void norm_forward(const NormArgs &a) {
  parallel_static(a.rows, usable_threads(a.threads, (a.rows + 7) / 8), [&](int, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const H *hidden = (const H *)a.hidden + row * a.width;
      const float *residual = a.residual ? a.residual + row * a.width : nullptr;
      float *sum = a.sum + row * a.width;
      O *out = (O *)a.normed + row * a.width;
      vf square[2] = {};
      for (int64_t i = 0, j = 0; i < a.width; i += W, j ^= 1) {
        const int lanes = lanes_at(i, a.width);
        vf v = load_lanes(hidden + i, lanes);
        if (residual) v = v + load_lanes(residual + i, lanes);
        store_lanes(sum + i, v, lanes);
        square[j] = v * v + square[j];
      }
      const float rstd = 1.f / std::sqrt(sum_lanes(square[0] + square[1]) / (float)a.width + (float)a.eps);
      a.rstd[row] = rstd;
      for (int64_t i = 0; i < a.width; i += W) {
        const int lanes = lanes_at(i, a.width);
        store_lanes(out + i, load_lanes(sum + i, lanes) * rstd * load_lanes(a.weight + i, lanes), lanes);
      }
    }
  });
}

// d sum = rstd * (w g - v * rstd^2 * mean(w g v)) + grad_sum
template <class O> void norm_backward(const NormArgs &a) {
  const int threads = usable_threads(a.threads, (a.rows + 7) / 8);
  const int64_t padded = (a.width + W - 1) / W * W;
  Buffer<float> partial(threads * padded);
  int used = 1;
  run_threads(threads, [&](int thread, int n) {
    if (thread == 0) used = n;
    float *dweight = &partial[thread * padded];
    memset(dweight, 0, padded * sizeof(float));
    for (int64_t row = a.rows * thread / n; row < a.rows * (thread + 1) / n; row++) {
      const O *grad = (const O *)a.grad + row * a.width;
      const float *v = a.sum + row * a.width, *extra = a.grad_sum ? a.grad_sum + row * a.width : nullptr;
      float *out = a.dsum + row * a.width;
      const float rstd = a.rstd[row];
      vf dot[2] = {};
      for (int64_t i = 0, j = 0; i < a.width; i += W, j ^= 1) {
        const int lanes = lanes_at(i, a.width);
        const vf gv = load_lanes(grad + i, lanes) * load_lanes(v + i, lanes);
        store(dweight + i, gv * rstd + load(dweight + i));
        dot[j] = gv * load_lanes(a.weight + i, lanes) + dot[j];
      }
      const float scale = rstd * rstd * rstd * sum_lanes(dot[0] + dot[1]) / (float)a.width;
      for (int64_t i = 0; i < a.width; i += W) {
        const int lanes = lanes_at(i, a.width);
        vf d = load_lanes(grad + i, lanes) * load_lanes(a.weight + i, lanes) * rstd - load_lanes(v + i, lanes) * scale;
        if (extra) d = d + load_lanes(extra + i, lanes);
        store_lanes(out + i, d, lanes);
      }
    }
  });
  for (int64_t i = 0; i < a.width; i++) {
    float s = 0.f;
    for (int t = 0; t < used; t++) s += partial[t * padded + i];
    a.dweight[i] = s;
  }
}

}  // namespace
