// Gradient of the scan.  Chunk by chunk from the end of the walk: states and decays of a chunk are recomputed from the state
// at its start, then the adjoint state G_t = g_t C_t + exp(dt_{t+1} A) G_{t+1} walks back over it.  The sums over channels
// (dB, dC, d dt_low) gather in lanes over all channel blocks of a task and are reduced once per chunk; the sums over batch
// and tokens (dA, dD, d dt_weight, d dt_bias) gather per thread.
#pragma once

#include "scan.h"

namespace {

constexpr int BACKWARD_STATES = 8;  // states per pass: adjoints and dA stay in registers together

// States and decays of NB states over m tokens from h[0]: e[k], h[k + 1]; with Y also y[k] += h[k + 1] . C.
template <int NB, bool CLAMP, bool Y>
MS_NOINLINE void replay_states(const vf *A2, const vf *h0, const vf *dt, const vf *dtx, Rows B, Rows C, int m, vf *e, vf *h,
                               vf *y) {
  vf state[NB];
  for (int n = 0; n < NB; n++) h[n] = state[n] = h0[n];
  const float *b = B.p, *c = C.p;
  for (int k = 0; k < m; k++, b += B.stride, c += C.stride) {
    const vf step = dt[k], input = dtx[k];
    vf sum = Y ? y[k] : (vf){};
#pragma GCC unroll 16
    for (int n = 0; n < NB; n++) {
      const vf decay = exp2_product<CLAMP>(step, A2[n]);
      state[n] = decay * state[n] + input * b[n];
      e[k * NB + n] = decay;
      h[(k + 1) * NB + n] = state[n];
      if (Y) sum = state[n] * c[n] + sum;
    }
    if (Y) y[k] = sum;
  }
}

struct AdjointSums {
  vf *du, *ddt;   // [m]: sum_n G B and sum_n G dh/d(dt A2) A2
  vf *dBC;        // [m][row]: lane-wise dB at n, dC at n + padded states
  int64_t row, dC;
};

template <int NB>
MS_NOINLINE void adjoint_states(const vf *A2, const vf *e, const vf *h, const vf *g, const vf *dt, const vf *dtx, Rows B,
                                Rows C, int m, vf *G_io, vf *dA_io, AdjointSums sums) {
  vf carry[NB], dA[NB];
  for (int n = 0; n < NB; n++) carry[n] = G_io[n], dA[n] = dA_io[n];
  for (int k = m - 1; k >= 0; k--) {
    const vf gk = g[k], step = dt[k], input = dtx[k];
    const float *b = B.p + k * B.stride, *c = C.p + k * C.stride;
    const vf *decay = e + k * NB, *before = h + k * NB, *after = before + NB;
    vf *dB = sums.dBC + k * sums.row, *dC = dB + sums.dC;
    vf du = sums.du[k], ddt = sums.ddt[k];
#pragma GCC unroll 16
    for (int n = 0; n < NB; n++) {
      const vf G = gk * c[n] + carry[n];
      dC[n] += gk * after[n];
      dB[n] += G * input;
      du = G * b[n] + du;
      carry[n] = G * decay[n];
      const vf t = carry[n] * before[n];
      ddt = t * A2[n] + ddt;
      dA[n] = t * step + dA[n];
    }
    sums.du[k] = du;
    sums.ddt[k] = ddt;
  }
  for (int n = 0; n < NB; n++) G_io[n] = carry[n], dA_io[n] = dA[n];
}

template <class S> class BackwardScan {
  static constexpr int NB = BACKWARD_STATES;

 public:
  explicit BackwardScan(const BackwardArgs &args)
      : a(args), s(args.shape), chunks(s.length), blocks(round_up(s.channels, W) / W),
        threads(usable_threads(s.threads, s.batch * a.directions * blocks)),
        packed(s, args.dir, args.directions, threads), N(packed.states), R(packed.rank),
        groups(choose_groups()), width(s.dt_rank + 2 * s.states), per_block(N + R + 2),
        sums(threads * a.directions * blocks * per_block),
        // One group in float32 writes the rows of dproj where they belong; otherwise the groups' shares are added later.
        partial(direct() ? 0 : a.directions * groups * s.batch * s.length * width) {}

  void run() {
    const int64_t tasks = a.directions * s.batch * groups;
    int used = 1;  // every thread that runs clears its sums; the runtime may grant fewer threads than asked for
    run_threads(threads, [&](int thread, int n) {
      if (thread == 0) used = n;
      memset(sums_of(thread, 0, 0), 0, a.directions * blocks * per_block * sizeof(vf));
      for (int64_t task = tasks * thread / n; task < tasks * (thread + 1) / n; task++)
        scan_group(thread, (int)(task / (s.batch * groups)), task / groups % s.batch, task % groups);
    });
    parallel_static(a.directions * blocks, threads, [&](int, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) write_parameter_grads((int)(i / blocks), i % blocks, used);
    });
    if (!direct())
      parallel_static(a.directions * s.batch * s.length, threads, [&](int, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) add_partial_rows((int)(i / (s.batch * s.length)), i % (s.batch * s.length));
      });
  }

 private:
  bool direct() const { return groups == 1 && sizeof(S) == sizeof(float); }

  // Large groups amortise the reduction over lanes; small batches are split so that every thread gets equal shares.
  int64_t choose_groups() const {
    const int64_t tasks = a.directions * s.batch;
    int64_t g = 1;
    while (g < blocks && tasks * g < 8 * threads && (tasks * g) % threads != 0) g++;
    return g;
  }

  vf *sums_of(int thread, int d, int64_t block) const {
    return &sums[((thread * a.directions + d) * blocks + block) * per_block];
  }

  struct Task {
    int d;
    int64_t b, first, blocks;
    Walk walk;
    vf *e, *h, *dt, *raw, *dtx, *x, *g, *y, *du, *ddt, *dBC, *edge, *G, *ddelta, *start;
    float *B, *C, *low;
  };

  void scan_group(int thread, int d, int64_t b, int64_t group) {
    const int64_t T = chunks.size, first = blocks * group / groups, count = blocks * (group + 1) / groups - first;
    const int64_t Tpad = round_up(T, 4), replayed = a.states ? 0 : (chunks.count - 1) * count * N;
    Scratch &scratch = Scratch::mine();
    scratch.reset(((2 * T + 1) * NB + 9 * T + 2 * T * 2 * N + count * N + count * Tpad + replayed + N) * sizeof(vf) +
                  Tpad * (2 * N + R) * sizeof(float) + 2048);
    Task t{};
    t.d = d;
    t.b = b;
    t.first = first;
    t.blocks = count;
    t.walk = Walk{s.length, a.dir[d].reverse != 0};
    t.e = scratch.take<vf>(T * NB);
    t.h = scratch.take<vf>((T + 1) * NB);
    for (vf **p : {&t.dt, &t.raw, &t.dtx, &t.x, &t.g, &t.y, &t.du, &t.ddt}) *p = scratch.take<vf>(T);
    t.dBC = scratch.take<vf>(T * 2 * N);
    t.edge = scratch.take<vf>(T * 2 * N);
    t.G = scratch.take<vf>(count * N);
    t.ddelta = scratch.take<vf>(count * Tpad);
    t.start = scratch.take<vf>(replayed + N);
    t.B = scratch.take<float>(T * N);
    t.C = scratch.take<float>(T * N);
    t.low = scratch.take<float>(Tpad * R);
    memset(t.G, 0, count * N * sizeof(vf));

    if (!a.states) replay_chunk_starts(t);
    for (int64_t c = chunks.count - 1; c >= 0; c--) {
      const int64_t k0 = c * chunks.size;
      const int m = (int)std::min<int64_t>(chunks.size, s.length - k0);
      load_small(t, k0, m, true);
      memset(t.dBC, 0, m * 2 * N * sizeof(vf));
      for (int64_t i = 0; i < count; i++) scan_block(thread, t, i, c, k0, m);
      write_rows(t, group, k0, m);
    }
  }

  void load_small(Task &t, int64_t k0, int m, bool with_C) {
    const Direction &dir = a.dir[t.d];
    const int64_t l0 = t.walk.token(k0), step = t.walk.step();
    small_rows(row_at<S>(dir.B, dir.B_batch, dir.B_row, t.b, l0), step * dir.B_row, (int)s.states, N, m, t.B, true);
    if (with_C)
      small_rows(row_at<S>(dir.C, dir.C_batch, dir.C_row, t.b, l0), step * dir.C_row, (int)s.states, N, m, t.C, true);
    if (s.dt_rank)
      small_rows(row_at<S>(dir.dt, dir.dt_batch, dir.dt_row, t.b, l0), step * dir.dt_row, (int)s.dt_rank, R, m, t.low,
                 true);
  }

  // What the numbers of a chunk ask for.
  struct Care {
    bool clamp;  // the clamped form of the exponential
    bool odd;    // some are not finite: times the zeros of a padding state they are NaN
  };

  // Fills x, raw, dt, dtx of a chunk.
  Care load_inputs(Task &t, int64_t block, int lanes, int64_t k0, int m) {
    const Direction &dir = a.dir[t.d];
    const int64_t l0 = t.walk.token(k0), step = t.walk.step(), ch = block * W;
    if (s.dt_rank) {
      project_dt(t.raw, m, packed.bias(t.d, block), packed.dt_weight(t.d, block), (int)R, Rows{t.low, R});
      clear_missing(t.raw, m, lanes);
    } else {
      const S *p = row_at<S>(dir.dt, dir.dt_batch, dir.dt_row, t.b, l0) + ch;
      for (int k = 0; k < m; k++) t.raw[k] = load_lanes(p + k * step * dir.dt_row, lanes) + packed.bias(t.d, block);
    }
    const S *x = row_at<S>(dir.x, dir.x_batch, dir.x_row, t.b, l0) + ch;
    const vf limit = packed.dt_limit(t.d, block);
    vi beyond = (vi){}, odd = (vi){};
    for (int k = 0; k < m; k++) t.dt[k] = s.softplus ? softplus(t.raw[k]) : t.raw[k];  // long chains overlap better apart
    for (int k = 0; k < m; k++) {
      t.x[k] = load_lanes(x + k * step * dir.x_row, lanes);
      t.dtx[k] = t.dt[k] * t.x[k];
      beyond |= ~(vi)(vabs(t.dt[k]) <= limit);
      if (N != s.states) odd |= not_finite(t.dtx[k]);
    }
    return {any_lane(beyond), any_lane(odd)};
  }

  template <int PASS, bool Y> void replay(const Task &t, bool clamp, int64_t block, int64_t n, const vf *h0, int m) {
    const vf *A2 = packed.A2(t.d, block) + n;
    const Rows B{t.B + n, N}, C{t.C + n, N};
    if (__builtin_expect(clamp, 0))
      replay_states<PASS, true, Y>(A2, h0, t.dt, t.dtx, B, C, m, t.e, t.h, t.y);
    else
      replay_states<PASS, false, Y>(A2, h0, t.dt, t.dtx, B, C, m, t.e, t.h, t.y);
  }

  // Without states from the forward pass: walk once and keep the state at every chunk start.
  void replay_chunk_starts(Task &t) {
    for (int64_t i = 0; i < t.blocks; i++) {
      const int64_t block = t.first + i;
      const int lanes = (int)std::min<int64_t>(W, s.channels - block * W);
      for (int64_t c = 0; c + 1 < chunks.count; c++) {
        const int64_t k0 = c * chunks.size;
        load_small(t, k0, chunks.size, false);
        const Care care = load_inputs(t, block, lanes, k0, chunks.size);
        if (__builtin_expect(care.odd, 0))
          replay_to_end<1>(t, care, block, c, i);
        else
          replay_to_end<NB>(t, care, block, c, i);
      }
    }
  }

  template <int PASS> void replay_to_end(Task &t, Care care, int64_t block, int64_t c, int64_t i) {
    const vf *start = chunk_start(t, c, i);
    vf *end = t.start + N + (c * t.blocks + i) * N;
    memset(end, 0, N * sizeof(vf));
    for (int64_t n = 0; n < (PASS == 1 ? s.states : N); n += PASS) {
      replay<PASS, false>(t, care.clamp, block, n, start + n, chunks.size);
      memcpy(end + n, t.h + chunks.size * PASS, PASS * sizeof(vf));
    }
  }

  const vf *chunk_start(const Task &t, int64_t c, int64_t i) const {
    if (c == 0) {
      memset(t.start, 0, N * sizeof(vf));
      return t.start;
    }
    if (!a.states) return t.start + N + ((c - 1) * t.blocks + i) * N;
    const int64_t slot = ((t.d * s.batch + t.b) * (chunks.count - 1) + c - 1) * blocks + t.first + i;
    return (const vf *)a.states + slot * N;
  }

  void scan_block(int thread, Task &t, int64_t i, int64_t c, int64_t k0, int m) {
    const int64_t block = t.first + i, ch = block * W;
    const int lanes = (int)std::min<int64_t>(W, s.channels - ch);
    Care care = load_inputs(t, block, lanes, k0, m);
    const bool need_y = a.z && !a.y_sum, has_D = a.dir[t.d].D != nullptr;
    const vf D = packed.D(t.d, block);
    const float scale = (float)a.scale;
    auto token_at = [&](int k) { return (t.b * s.length + t.walk.token(k0 + k)) * s.channels + ch; };

    for (int k = 0; k < m; k++) {
      const int64_t l = t.walk.token(k0 + k);
      const vf g = load_lanes(row_at<S>(a.grad, a.grad_batch, a.grad_row, t.b, l) + ch, lanes) * scale;
      t.du[k] = t.ddt[k] = (vf){};
      if (!a.z) {
        t.g[k] = g;
        continue;
      }
      const vf z = load_lanes(row_at<S>(a.z, a.z_batch, a.z_row, t.b, l) + ch, lanes), sig = sigmoid(z);
      t.g[k] = g * z * sig;
      // d silu; the first direction writes dz for both, without y_sum it waits for the recomputed y
      const vf dgate = g * (sig + z * sig * (1.f - sig));
      if (need_y) {
        t.y[k] = has_D ? D * t.x[k] : (vf){};
        t.ddelta[i * round_up(chunks.size, 4) + k] = dgate;
      } else if (t.d == 0) {
        store_lanes((S *)a.dz + token_at(k), dgate * load_lanes((const S *)a.y_sum + token_at(k), lanes), lanes);
      }
    }

    vf *state_sums = sums_of(thread, t.d, block);
    if (N != s.states) {
      vi odd = (vi){};
      for (int k = 0; k < m; k++) odd |= not_finite(t.g[k]);
      care.odd |= any_lane(odd);
    }
    // lanes of dB and dC are added up: those beyond the last channel go to a place of their own, where they are cleared
    vf *dBC = lanes == W ? t.dBC : t.edge;
    if (lanes < W) memset(t.edge, 0, m * 2 * N * sizeof(vf));
    if (__builtin_expect(care.odd, 0))
      walk_back<1>(t, care.clamp, need_y, i, c, m, state_sums, dBC);
    else
      walk_back<NB>(t, care.clamp, need_y, i, c, m, state_sums, dBC);
    if (lanes < W) {
      clear_missing(t.edge, m * 2 * N, lanes);
      for (int64_t j = 0; j < m * 2 * N; j++) t.dBC[j] += t.edge[j];
    }

    if (s.softplus)
      for (int k = 0; k < m; k++) t.raw[k] = sigmoid(t.raw[k]);
    vf *ddelta = t.ddelta + i * round_up(chunks.size, 4), dD = state_sums[N + R], dbias = state_sums[N + R + 1];
    for (int k = 0; k < m; k++) {
      if (need_y) store_lanes((S *)a.dz + token_at(k), ddelta[k] * t.y[k], lanes);
      const vf dx = t.dt[k] * t.du[k];
      store_lanes((S *)a.out[t.d].dx + token_at(k), has_D ? t.g[k] * D + dx : dx, lanes);
      vf dd = t.ddt[k] * (1.f / LOG2E) + t.x[k] * t.du[k];
      if (s.softplus) dd = dd * t.raw[k];
      dD = t.g[k] * t.x[k] + dD;
      dbias = dbias + dd;
      ddelta[k] = dd;
    }
    clear_missing(ddelta, m, lanes);
    state_sums[N + R] = dD;
    state_sums[N + R + 1] = dbias;
    if (s.dt_rank) {
      add_dt_weight_grad(state_sums + N, ddelta, t.low, m);
    } else {
      const DirectionGrad &out = a.out[t.d];
      for (int k = 0; k < m; k++)
        store_lanes((S *)out.ddt + (t.b * s.length + t.walk.token(k0 + k)) * out.ddt_row + ch, ddelta[k], lanes);
    }
  }

  // Replays the chunk and walks its adjoint states back, PASS states at a time.
  template <int PASS>
  void walk_back(const Task &t, bool clamp, bool need_y, int64_t i, int64_t c, int m, vf *state_sums, vf *dBC) {
    const int64_t block = t.first + i;
    const vf *start = chunk_start(t, c, i);
    for (int64_t n = 0; n < (PASS == 1 ? s.states : N); n += PASS) {
      if (need_y)
        replay<PASS, true>(t, clamp, block, n, start + n, m);
      else
        replay<PASS, false>(t, clamp, block, n, start + n, m);
      adjoint_states<PASS>(packed.A2(t.d, block) + n, t.e, t.h, t.g, t.dt, t.dtx, Rows{t.B + n, N}, Rows{t.C + n, N}, m,
                           t.G + i * N + n, state_sums + n, AdjointSums{t.du, t.ddt, dBC + n, 2 * N, N});
    }
  }

  // d dt_weight [r][lanes] += sum_k ddelta[k] * dt_low[k][r]
  void add_dt_weight_grad(vf *sum, const vf *ddelta, const float *low, int m) const {
    for (int64_t r = 0; r < R; r += 4) {
      vf w[4];
      for (int j = 0; j < 4; j++) w[j] = sum[r + j];
      for (int k = 0; k < m; k++)
        for (int j = 0; j < 4; j++) w[j] = ddelta[k] * low[k * R + r + j] + w[j];
      for (int j = 0; j < 4; j++) sum[r + j] = w[j];
    }
  }

  struct RowOut {
    float *p;
    int64_t batch, stride;
  };

  // dB, dC and d dt_low of a chunk, reduced over the channels of the task.
  void write_rows(const Task &t, int64_t group, int64_t k0, int m) {
    RowOut rows[3];  // dt_low, B, C
    const int64_t L = s.length;
    if (direct()) {
      const DirectionGrad &out = a.out[t.d];
      rows[0] = {(float *)out.ddt, L * out.ddt_row, out.ddt_row};
      rows[1] = {(float *)out.dB, L * out.dB_row, out.dB_row};
      rows[2] = {(float *)out.dC, L * out.dC_row, out.dC_row};
    } else {
      float *p = &partial[(t.d * groups + group) * s.batch * L * width];
      rows[0] = {p, L * width, width};
      rows[1] = {p + s.dt_rank, L * width, width};
      rows[2] = {p + s.dt_rank + s.states, L * width, width};
    }
    for (int k = 0; k < m; k++) {
      const int64_t l = t.walk.token(k0 + k);
      float *dB = rows[1].p + t.b * rows[1].batch + l * rows[1].stride;
      float *dC = rows[2].p + t.b * rows[2].batch + l * rows[2].stride;
      for (int64_t n = 0; n < 2 * N; n += W) {
        vf tile[W];
        for (int i = 0; i < W; i++) tile[i] = t.dBC[k * 2 * N + n + i];
        const vf sum = reduce_lanes<Add>(tile);
        for (int i = 0; i < W; i++) {
          const int64_t state = n + i < N ? n + i : n + i - N;
          if (state < s.states) (n + i < N ? dB : dC)[state] = sum[i];
        }
      }
    }
    if (s.dt_rank) write_dt_low(t, rows[0], k0, m);
  }

  // d dt_low[k][r] = sum over channels of ddelta[k] * dt_weight[r], in tiles of W sums.
  void write_dt_low(const Task &t, const RowOut &out, int64_t k0, int m) {
    constexpr int TK = W == 16 ? 4 : 2, TR = W / TK;
    const int64_t Tpad = round_up(chunks.size, 4);
    for (int k = 0; k < m; k += TK) {
      for (int64_t r = 0; r < R; r += TR) {
        vf tile[W];
        for (int i = 0; i < W; i++) tile[i] = (vf){};
        for (int64_t i = 0; i < t.blocks; i++) {
          const vf *w = packed.dt_weight(t.d, t.first + i) + r, *dd = t.ddelta + i * Tpad + k;
          for (int j = 0; j < TK; j++)
            for (int q = 0; q < TR; q++) tile[j * TR + q] = dd[j] * w[q] + tile[j * TR + q];
        }
        const vf sum = reduce_lanes<Add>(tile);
        for (int j = 0; j < TK && k + j < m; j++) {
          float *p = out.p + t.b * out.batch + t.walk.token(k0 + k + j) * out.stride;
          for (int q = 0; q < TR && r + q < s.dt_rank; q++) p[r + q] = sum[j * TR + q];
        }
      }
    }
  }

  void add_partial_rows(int d, int64_t row) {
    const DirectionGrad &out = a.out[d];
    const int64_t plane = s.batch * s.length * width, R0 = s.dt_rank, N0 = s.states;
    const float *p = &partial[d * groups * plane + row * width];
    for (int64_t i = 0; i < width; i++) {
      float sum = p[i];
      for (int64_t g = 1; g < groups; g++) sum += p[g * plane + i];
      S *q = i < R0        ? (S *)out.ddt + row * out.ddt_row + i
             : i < R0 + N0 ? (S *)out.dB + row * out.dB_row + i - R0
                           : (S *)out.dC + row * out.dC_row + i - R0 - N0;
      vf one = splat(sum);
      store_lanes(q, one, 1);
    }
  }

  void write_parameter_grads(int d, int64_t block, int used_threads) {
    const DirectionGrad &out = a.out[d];
    vf *sum = sums_of(0, d, block);
    for (int t = 1; t < used_threads; t++) {
      const vf *other = sums_of(t, d, block);
      for (int64_t i = 0; i < per_block; i++) sum[i] += other[i];
    }
    for (int64_t lane = 0; lane < W && block * W + lane < s.channels; lane++) {
      const int64_t ch = block * W + lane;
      for (int64_t n = 0; n < s.states; n++) out.dA[ch * s.states + n] = sum[n][lane];
      if (out.ddt_weight)
        for (int64_t r = 0; r < s.dt_rank; r++) out.ddt_weight[ch * s.dt_rank + r] = sum[N + r][lane];
      if (out.dD) out.dD[ch] = sum[N + R][lane];
      if (out.ddt_bias) out.ddt_bias[ch] = sum[N + R + 1][lane];
    }
  }

  const BackwardArgs &a;
  const ScanShape &s;
  const Chunks chunks;
  const int64_t blocks;
  const int threads;
  const PackedParameters packed;
  const int64_t N, R, groups, width, per_block;
  const Buffer<vf> sums;
  const Buffer<float> partial;
};

}  // namespace
