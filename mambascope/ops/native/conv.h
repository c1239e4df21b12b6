// Depthwise convolution over tokens, up to four taps, causal and anti-causal from one read of x, optional SiLU.
#pragma once

#include "parallel.h"
#include "scan.h"

namespace {

constexpr int TAPS = 4;

struct ConvArgs {
  int64_t batch, length, channels, taps;
  int64_t silu, bfloat16, threads, directions;
  const void *x;
  int64_t x_batch, x_row;
  const float *weight[2], *bias[2];  // [E, taps], [E] or null; direction i looks back (reverse 0) or ahead (reverse 1)
  int64_t reverse[2];
  void *y[2];  // forward: outputs [B, L, E] contiguous
  // backward only
  const void *grad[2];
  int64_t grad_batch[2], grad_row[2];
  void *dx;
  float *dweight[2], *dbias[2];
};

// f(0), ..., f(count - 1), unrolled for all taps.  A tap that is not there has the weight zero, but zero times infinity is NaN.
template <class F> MS_INLINE void each_tap(int64_t count, F f) {
  if (__builtin_expect(count == TAPS, 1)) {
#pragma GCC unroll 4
    for (int j = 0; j < TAPS; j++) f(j);
  } else {
    for (int j = 0; j < count; j++) f(j);
  }
}

struct Taps {
  vf w[TAPS], bias;  // w[j] multiplies the token j steps back (ahead when reversed)
};

MS_NOINLINE Taps load_taps(const ConvArgs &a, int d, int64_t ch, int lanes) {
  Taps t;
  float w[TAPS][W] = {}, bias[W] = {};
  for (int i = 0; i < lanes; i++) {
    for (int64_t j = 0; j < a.taps; j++) w[j][i] = a.weight[d][(ch + i) * a.taps + a.taps - 1 - j];
    if (a.bias[d]) bias[i] = a.bias[d][ch + i];
  }
  for (int j = 0; j < TAPS; j++) t.w[j] = load(w[j]);
  t.bias = load(bias);
  return t;
}

template <class S> class Conv {
 public:
  explicit Conv(const ConvArgs &args) : a(args), blocks(round_up(a.channels, W) / W) {}

  void forward() {
    const int64_t tasks = a.batch * blocks;
    const int threads = usable_threads(a.threads, tasks);
    parallel_dynamic(tasks, threads, [&](int64_t task) {
      const int64_t b = task / blocks, ch = task % blocks * W;
      const int lanes = (int)std::min<int64_t>(W, a.channels - ch);
      if (a.taps < TAPS || lanes < W)
        a.silu ? walk<true, false>(b, ch, lanes) : walk<false, false>(b, ch, lanes);
      else
        a.silu ? walk<true, true>(b, ch, lanes) : walk<false, true>(b, ch, lanes);
    });
  }

  void backward() {
    const int64_t per_block = a.directions * (TAPS + 1);
    const int threads = usable_threads(a.threads, a.batch * blocks);
    Buffer<vf> sums(threads * blocks * per_block);
    int used = 1;
    run_threads(threads, [&](int thread, int n) {
      if (thread == 0) used = n;
      vf *sums_of_thread = &sums[thread * blocks * per_block];
      memset(sums_of_thread, 0, blocks * per_block * sizeof(vf));
      const int64_t tasks = a.batch * blocks;
      for (int64_t task = tasks * thread / n; task < tasks * (thread + 1) / n; task++)
        adjoint(task / blocks, task % blocks * W, sums_of_thread + task % blocks * per_block);
    });
    for (int64_t block = 0; block < blocks; block++) {
      vf *sum = &sums[block * per_block];
      for (int t = 1; t < used; t++)
        for (int64_t i = 0; i < per_block; i++) sum[i] += sums[(t * blocks + block) * per_block + i];
      for (int64_t lane = 0; lane < W && block * W + lane < a.channels; lane++)
        for (int d = 0; d < a.directions; d++) {
          const vf *s = sum + d * (TAPS + 1);
          for (int64_t j = 0; j < a.taps; j++)
            a.dweight[d][(block * W + lane) * a.taps + a.taps - 1 - j] = s[j][lane];
          if (a.dbias[d]) a.dbias[d][block * W + lane] = s[TAPS][lane];
        }
    }
  }

 private:
  template <bool FULL> MS_INLINE vf get(const S *p, int lanes) { return FULL ? load(p) : load_lanes(p, lanes); }
  template <bool FULL> MS_INLINE void put(S *p, vf v, int lanes) {
    if (FULL)
      store(p, v);
    else
      store_lanes(p, v, lanes);
  }

  // x[l - 3 .. l + 3] slides through registers: one load per token serves both directions.  FULL: all lanes, all taps.
  template <bool SILU, bool FULL> void walk(int64_t b, int64_t ch, int lanes) const {
    const S *x = row_at<S>(a.x, a.x_batch, a.x_row, b, 0) + ch;
    const int64_t count = FULL ? TAPS : a.taps;
    Taps taps[2];
    S *y[2];
    for (int d = 0; d < a.directions; d++) {
      taps[d] = load_taps(a, d, ch, lanes);
      y[d] = (S *)a.y[d] + b * a.length * a.channels + ch;
    }
    vf v[2 * TAPS - 1];
    for (int i = 0; i < 2 * TAPS - 1; i++)
      v[i] = i >= TAPS && i - TAPS < a.length ? get<FULL>(x + (i - TAPS) * a.x_row, lanes) : (vf){};
    for (int64_t l = 0; l < a.length; l++) {
      for (int i = 0; i < 2 * TAPS - 2; i++) v[i] = v[i + 1];
      v[2 * TAPS - 2] = l + TAPS - 1 < a.length ? get<FULL>(x + (l + TAPS - 1) * a.x_row, lanes) : (vf){};
      for (int d = 0; d < a.directions; d++) {
        const Taps &t = taps[d];
        vf s = t.bias;
        if (a.reverse[d])
          each_tap(count, [&](int j) { s = t.w[j] * v[TAPS - 1 + j] + s; });
        else
          each_tap(count, [&](int j) { s = t.w[j] * v[TAPS - 1 - j] + s; });
        put<FULL>(y[d] + l * a.channels, SILU ? silu(s) : s, lanes);
      }
    }
  }

  // Gradients of the pre-activations go to a scratch column, then dx gathers from it; x has TAPS - 1 zeros at both ends.
  void adjoint(int64_t b, int64_t ch, vf *sums) const {
    constexpr int PAD = TAPS - 1;
    const int64_t L = a.length;
    const int lanes = (int)std::min<int64_t>(W, a.channels - ch);
    Scratch &scratch = Scratch::mine();
    scratch.reset(((a.directions + 1) * L + 2 * PAD) * sizeof(vf) + 256);
    vf *x = scratch.take<vf>(L + 2 * PAD) + PAD, *ga[2];
    const S *xs = row_at<S>(a.x, a.x_batch, a.x_row, b, 0) + ch;
    for (int i = 1; i <= PAD; i++) x[-i] = x[L + i - 1] = (vf){};
    for (int64_t l = 0; l < L; l++) x[l] = load_lanes(xs + l * a.x_row, lanes);
    Taps taps[2];
    for (int d = 0; d < a.directions; d++) {
      ga[d] = scratch.take<vf>(L);
      taps[d] = load_taps(a, d, ch, lanes);
      vf *s = sums + d * (TAPS + 1);
      if (a.reverse[d])
        pre_activation_grad<1>(taps[d], x, ga[d], b, ch, d, lanes, s);
      else
        pre_activation_grad<-1>(taps[d], x, ga[d], b, ch, d, lanes, s);
    }
    S *dx = (S *)a.dx + b * L * a.channels + ch;
    for (int64_t l = 0; l < L; l++) {
      vf s = (vf){};
      for (int d = 0; d < a.directions; d++) {
        const int64_t ahead = a.reverse[d] ? -1 : 1;
        const int64_t count = std::min(a.taps, a.reverse[d] ? l + 1 : L - l);  // outputs that this token reaches
        each_tap(count, [&](int j) { s = taps[d].w[j] * ga[d][l + ahead * j] + s; });
      }
      store_lanes(dx + l * a.channels, s, lanes);
    }
  }

  template <int STEP>
  void pre_activation_grad(const Taps &t, const vf *x, vf *ga, int64_t b, int64_t ch, int d, int lanes, vf *sums) const {
    const S *g = row_at<S>(a.grad[d], a.grad_batch[d], a.grad_row[d], b, 0) + ch;
    vf s[TAPS + 1];
    for (int j = 0; j <= TAPS; j++) s[j] = sums[j];
    for (int64_t l = 0; l < a.length; l++) {
      vf grad = load_lanes(g + l * a.grad_row[d], lanes);
      if (a.silu) {
        vf pre = t.bias;
        each_tap(a.taps, [&](int j) { pre = t.w[j] * x[l + STEP * j] + pre; });
        const vf sig = sigmoid(pre);
        grad = grad * (sig + pre * sig * (1.f - sig));
      }
      ga[l] = grad;
      for (int j = 0; j < TAPS; j++) s[j] = grad * x[l + STEP * j] + s[j];
      s[TAPS] = s[TAPS] + grad;
    }
    for (int j = 0; j <= TAPS; j++) sums[j] = s[j];
  }

  const ConvArgs &a;
  const int64_t blocks;
};

}  // namespace
