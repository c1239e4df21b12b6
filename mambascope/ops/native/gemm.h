// Products with packed weights: out[rows, columns] = x[rows, depth] . weight[columns, depth]^T, float32.
//
// A packed weight holds panels of PANEL columns, depth by depth, so that the inner loop reads it in order; the columns that
// the last panel lacks are zero.  MKL and oneDNN pack in every call, which costs more than a product of few rows.
#pragma once

#include "parallel.h"
#include "scan.h"

namespace {

constexpr int PANEL = 2 * W;
constexpr int TILE_ROWS = W == 16 ? 12 : 6;  // with two vectors each they fill the registers

struct GemmArgs {
  int64_t rows, depth, columns, threads;
  const float *x;
  int64_t x_row;
  const float *packed;
  float *out;
  int64_t out_row;
};

inline int64_t gemm_panels(int64_t columns) { return round_up(columns, PANEL) / PANEL; }

inline void gemm_pack(const float *weight, int64_t columns, int64_t depth, float *out) {
  for (int64_t panel = 0; panel < gemm_panels(columns); panel++)
    for (int64_t k = 0; k < depth; k++)
      for (int64_t j = 0; j < PANEL; j++) {
        const int64_t column = panel * PANEL + j;
        *out++ = column < columns ? weight[column * depth + k] : 0.f;
      }
}

// ROWS rows of one panel.
template <int ROWS>
MS_NOINLINE void gemm_tile(const float *x, int64_t x_row, const vf *panel, int64_t depth, float *out, int64_t out_row,
                           int columns) {
  vf sum[ROWS][2] = {};
  for (int64_t k = 0; k < depth; k++) {
    const vf w0 = panel[2 * k], w1 = panel[2 * k + 1];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
      const float v = x[i * x_row + k];
      sum[i][0] = w0 * v + sum[i][0];
      sum[i][1] = w1 * v + sum[i][1];
    }
  }
  for (int i = 0; i < ROWS; i++) {
    store_lanes(out + i * out_row, sum[i][0], std::min(columns, W));
    if (columns > W) store_lanes(out + i * out_row + W, sum[i][1], columns - W);
  }
}

using GemmTile = void (*)(const float *, int64_t, const vf *, int64_t, float *, int64_t, int);
template <int... I> GemmTile gemm_tile_of(int rows, std::integer_sequence<int, I...>) {
  static constexpr GemmTile tiles[] = {gemm_tile<I + 1>...};
  return tiles[rows - 1];
}

inline void gemm(const GemmArgs &a) {
  const int64_t panels = gemm_panels(a.columns), all_tiles = (a.rows + TILE_ROWS - 1) / TILE_ROWS;
  const int threads = usable_threads(a.threads, panels * all_tiles);
  // a panel stays in the first cache while it meets the rows; rows are split where the panels alone are too few to share
  const int64_t pieces = threads == 1 ? 1 : std::min<int64_t>(all_tiles, (4 * threads + panels - 1) / panels);
  parallel_static(panels * pieces, threads, [&](int, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t panel = task / pieces, piece = task % pieces;
      const int64_t first = all_tiles * piece / pieces * TILE_ROWS;
      const int64_t last = std::min(a.rows, all_tiles * (piece + 1) / pieces * TILE_ROWS);
      const vf *weight = (const vf *)a.packed + panel * a.depth * 2;
      const int columns = (int)std::min<int64_t>(PANEL, a.columns - panel * PANEL);
      for (int64_t row = first; row < last; row += TILE_ROWS) {
        const int rows = (int)std::min<int64_t>(TILE_ROWS, last - row);
        gemm_tile_of(rows, std::make_integer_sequence<int, TILE_ROWS>{})(
            a.x + row * a.x_row, a.x_row, weight, a.depth, a.out + row * a.out_row + panel * PANEL, a.out_row, columns);
      }
    }
  });
}

}  // namespace
