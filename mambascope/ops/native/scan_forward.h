// Forward scan: h = exp(dt A) h + dt x B, y = h . C + D x, for one or two directions, gate and scale in the last pass.
#pragma once

#include "scan.h"

namespace {

// Rows of the next chunk: a walk over W channels touches one cache line per row, which the hardware prefetcher does not see.
struct Prefetch {
  const char *p[4];
  int64_t stride[4];
  int m = 0;
};

// The recurrence of NB states over the m tokens of a chunk; y[k] gains h . C.
template <int NB, bool CLAMP>
MS_NOINLINE void scan_states(const vf *A2, vf *h_io, const vf *dt, const vf *dtx, vf *y, Rows B, Rows C, int m,
                             const Prefetch &next) {
  vf h[NB];
  for (int n = 0; n < NB; n++) h[n] = h_io[n];
  const float *b = B.p, *c = C.p;
  for (int k = 0; k < m; k++, b += B.stride, c += C.stride) {
    const vf step = dt[k], input = dtx[k];
    vf y0 = y[k], y1 = (vf){};
    if (k < next.m) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) __builtin_prefetch(next.p[i] + k * next.stride[i]);
    }
#pragma GCC unroll 16
    for (int n = 0; n < NB; n++) {
      h[n] = exp2_product<CLAMP>(step, A2[n]) * h[n] + input * b[n];
      if (n & 1)
        y1 = h[n] * c[n] + y1;
      else
        y0 = h[n] * c[n] + y0;
    }
    y[k] = y0 + y1;
  }
  for (int n = 0; n < NB; n++) h_io[n] = h[n];
}

// All states, NB at a time.
template <int NB, bool CLAMP>
MS_INLINE void walk_states(int64_t states, const vf *A2, vf *h, const vf *dt, const vf *dtx, vf *y, Rows B, Rows C, int m,
                           Prefetch next) {
  for (int64_t n = 0; n < states; n += NB) {
    scan_states<NB, CLAMP>(A2 + n, h + n, dt, dtx, y, Rows{B.p + n, B.stride}, Rows{C.p + n, C.stride}, m, next);
    next.m = 0;
  }
}

template <class S, int NB> class ForwardScan {
 public:
  explicit ForwardScan(const ForwardArgs &args)
      : a(args), s(args.shape), chunks(s.length), threads(usable_threads(s.threads, s.batch * round_up(s.channels, W) / W)),
        packed(s, args.dir, args.directions, threads, args.packed) {}

  void run() {
    // Four channel blocks share the rows of a chunk (whole cache lines of B, C, dt_low); fewer when threads would idle.
    group = MAX_GROUP;
    while (group > 1 && s.batch * ((packed.blocks + group - 1) / group) < 4 * threads) group--;
    groups = (packed.blocks + group - 1) / group;
    Buffer<float> partial_score(a.score ? groups * s.batch * s.length : 0);
    parallel_dynamic(s.batch * groups, threads, [&](int64_t task) {
      scan_group(task / groups, task % groups, partial_score.get() + (task % groups) * s.batch * s.length);
    });
    if (!a.score) return;
    for (int64_t i = 0; i < s.batch * s.length; i++) {
      float m = partial_score[i];
      for (int64_t g = 1; g < groups; g++) {
        const float other = partial_score[g * s.batch * s.length + i];
        if (!(other <= m) && m == m) m = other;  // the larger one, or NaN if either is
      }
      a.score[i] = m;
    }
  }

 private:
  static constexpr int MAX_GROUP = 4;

  void scan_group(int64_t b, int64_t g, float *partial_score) {
    const int64_t first = g * group, blocks = std::min<int64_t>(group, packed.blocks - first);
    const int64_t L = s.length, N = packed.states;
    const bool two = a.directions == 2;
    Scratch &scratch = Scratch::mine();
    scratch.reset((blocks * N + (two ? blocks * L : 0) + 5 * MAX_CHUNK + W) * sizeof(vf) +
                  MAX_CHUNK * (2 * N + packed.rank) * sizeof(float) + 1024);
    vf *h = scratch.take<vf>(blocks * N), *y_first = scratch.take<vf>(two ? blocks * L : 0);
    vf *dt = scratch.take<vf>(MAX_CHUNK), *dtx = scratch.take<vf>(MAX_CHUNK), *y = scratch.take<vf>(MAX_CHUNK);
    vf *top = scratch.take<vf>(MAX_CHUNK + W);
    float *small = scratch.take<float>(MAX_CHUNK * (2 * N + packed.rank));

    for (int d = 0; d < a.directions; d++) {
      const Direction &dir = a.dir[d];
      const Walk walk{L, dir.reverse != 0};
      const bool last = d + 1 == a.directions;
      memset(h, 0, blocks * N * sizeof(vf));
      for (int64_t c = 0; c < chunks.count; c++) {
        const int64_t k0 = c * chunks.size, l0 = walk.token(k0), step = walk.step();
        const int m = (int)std::min<int64_t>(chunks.size, L - k0);
        const Rows B = small_rows(row_at<S>(dir.B, dir.B_batch, dir.B_row, b, l0), step * dir.B_row, (int)s.states, N, m,
                                  small, false);
        const Rows C = small_rows(row_at<S>(dir.C, dir.C_batch, dir.C_row, b, l0), step * dir.C_row, (int)s.states, N, m,
                                  small + MAX_CHUNK * N, false);
        Rows low{};
        if (s.dt_rank)
          low = small_rows(row_at<S>(dir.dt, dir.dt_batch, dir.dt_row, b, l0), step * dir.dt_row, (int)s.dt_rank,
                           s.dt_rank, m, small + 2 * MAX_CHUNK * N, false);
        for (int64_t i = 0; i < blocks; i++) {
          const int64_t block = first + i, ch = block * W;
          const int lanes = (int)std::min<int64_t>(W, s.channels - ch);
          vf *state = h + i * N;
          if (a.states && c > 0) memcpy(saved_state(d, b, c, block), state, N * sizeof(vf));

          const S *x = row_at<S>(dir.x, dir.x_batch, dir.x_row, b, l0) + ch;
          const int64_t x_step = step * dir.x_row;
          if (s.dt_rank) {
            project_dt(dt, m, packed.bias(d, block), packed.dt_weight(d, block), (int)s.dt_rank, low);
            clear_missing(dt, m, lanes);
          } else {
            const S *p = row_at<S>(dir.dt, dir.dt_batch, dir.dt_row, b, l0) + ch;
            for (int k = 0; k < m; k++) dt[k] = load_lanes(p + k * step * dir.dt_row, lanes) + packed.bias(d, block);
          }
          const vf D = packed.D(d, block), limit = packed.dt_limit(d, block);
          vi beyond = (vi){}, odd = (vi){};
          if (s.softplus)  // apart from what follows: its long chains overlap better
            for (int k = 0; k < m; k++) dt[k] = softplus(dt[k]);
          for (int k = 0; k < m; k++) {
            const vf step_size = dt[k], xk = load_lanes(x + k * x_step, lanes);
            dtx[k] = step_size * xk;
            y[k] = dir.D ? D * xk : (vf){};  // infinity times a missing D is not a NaN
            beyond |= ~(vi)(vabs(step_size) <= limit);
            if (N != s.states) odd |= not_finite(dtx[k]);  // times the zeros of a padding state it is a NaN
          }

          Prefetch next;
          if (k0 + m < L) next = next_rows(d, b, ch, walk.token(k0 + m), step, (int)std::min<int64_t>(m, L - k0 - m));
          const vf *A2 = packed.A2(d, block);
          if (__builtin_expect(any_lane(odd), 0))
            walk_states<1, true>(s.states, A2, state, dt, dtx, y, B, C, m, next);
          else if (__builtin_expect(any_lane(beyond), 0))
            walk_states<NB, true>(N, A2, state, dt, dtx, y, B, C, m, next);
          else
            walk_states<NB, false>(N, A2, state, dt, dtx, y, B, C, m, next);

          vf *partner = y_first + i * L;
          if (!last) {
            for (int k = 0; k < m; k++) partner[walk.token(k0 + k)] = y[k];
          } else {
            if (two)
              for (int k = 0; k < m; k++) y[k] += partner[walk.token(k0 + k)];
            if (a.score) raise_top(top, y, m, lanes, i == 0);
            finish(b, ch, lanes, y, m, walk, k0);
          }
        }
        if (last && a.score) reduce_top(top, m, walk, k0, partial_score + b * L);
      }
    }
  }

  // Gate, scale and store the summed output of a chunk.
  void finish(int64_t b, int64_t ch, int lanes, const vf *y, int m, const Walk &walk, int64_t k0) {
    const float scale = (float)a.scale;
    vf gate[MAX_CHUNK];
    if (a.z)
      for (int k = 0; k < m; k++)
        gate[k] = silu(load_lanes(row_at<S>(a.z, a.z_batch, a.z_row, b, walk.token(k0 + k)) + ch, lanes));
    for (int k = 0; k < m; k++) {
      const int64_t at = (b * s.length + walk.token(k0 + k)) * s.channels + ch;
      if (a.y_sum) store_lanes((S *)a.y_sum + at, y[k], lanes);
      const vf v = y[k] * scale;
      store_lanes((S *)a.out + at, a.z ? v * gate[k] : v, lanes);
    }
  }

  static void raise_top(vf *top, const vf *y, int m, int lanes, bool start) {
    vf floor = splat(-__builtin_inff());
    const vi missing = missing_lanes(lanes);  // they must not win
    for (int k = 0; k < m; k++) {
      const vf v = missing ? floor : y[k];
      top[k] = start ? v : Max::apply(top[k], v);
    }
  }

  static void reduce_top(vf *top, int m, const Walk &walk, int64_t k0, float *score) {
    for (int k = m; k < m + W; k++) top[k] = (vf){};
    for (int k = 0; k < m; k += W) {
      vf tile[W];
      for (int i = 0; i < W; i++) tile[i] = top[k + i];
      const vf best = reduce_lanes<Max>(tile);
      for (int i = 0; i < W && k + i < m; i++) score[walk.token(k0 + k + i)] = best[i];
    }
  }

  Prefetch next_rows(int d, int64_t b, int64_t ch, int64_t l, int64_t step, int m) const {
    const Direction &dir = a.dir[d];
    Prefetch next;
    next.m = m;
    auto set = [&](int i, const void *p, int64_t stride) {
      next.p[i] = (const char *)p;
      next.stride[i] = step * stride * (int64_t)sizeof(S);
    };
    set(0, row_at<S>(dir.x, dir.x_batch, dir.x_row, b, l) + ch, dir.x_row);
    if (s.dt_rank)
      set(1, next.p[0], dir.x_row);
    else
      set(1, row_at<S>(dir.dt, dir.dt_batch, dir.dt_row, b, l) + ch, dir.dt_row);
    const bool last = d + 1 == a.directions;
    if (last && a.z)
      set(2, row_at<S>(a.z, a.z_batch, a.z_row, b, l) + ch, a.z_row);
    else
      set(2, next.p[0], dir.x_row);
    if (last)
      set(3, (const S *)a.out + (b * s.length + l) * s.channels + ch, s.channels);
    else
      set(3, next.p[0], dir.x_row);
    return next;
  }

  vf *saved_state(int d, int64_t b, int64_t c, int64_t block) const {
    const int64_t slot = ((d * s.batch + b) * (chunks.count - 1) + c - 1) * packed.blocks + block;
    return (vf *)a.states + slot * packed.states;
  }

  const ForwardArgs &a;
  const ScanShape &s;
  const Chunks chunks;
  const int threads;
  const PackedParameters packed;
  int64_t group = 1, groups = 1;
};

}  // namespace
