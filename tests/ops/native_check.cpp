// The kernels of one build against formulas in double, gradients by finite differences: for machines without PyTorch.
//
// Prints one line for each check and ends with status 1 if any fails.

#include <cstdio>
#include <functional>
#include <map>
#include <random>
#include <string>

#include "kernels.cpp"

namespace {

using Values = std::vector<float>;
using Inputs = std::map<std::string, Values>;
using Doubles = std::map<std::string, std::vector<double>>;
using Formula = std::function<std::vector<double>(const Doubles &)>;

std::mt19937 generator(0);
int failures = 0;

Values draw(size_t count, float scale = 1.f, float shift = 0.f) {
  std::normal_distribution<float> normal(0.f, 1.f);
  Values values(count);
  for (float &v : values) v = shift + scale * normal(generator);
  return values;
}

double sigmoid_of(double x) { return 1 / (1 + std::exp(-x)); }

void report(const std::string &name, double error, double limit) {
  const bool good = error < limit;
  printf("%-44s %.1e %s\n", name.c_str(), error, good ? "ok" : "WRONG");
  failures += !good;
}

template <class T> double relative(const Values &value, const std::vector<T> &expected) {
  double worst = 0, scale = 1e-30;
  for (size_t i = 0; i < expected.size(); i++) {
    worst = std::max(worst, std::abs(value[i] - (double)expected[i]));
    scale = std::max(scale, std::abs((double)expected[i]));
  }
  return worst / scale;
}

Doubles widen(const Inputs &inputs) {
  Doubles doubles;
  for (auto &[name, values] : inputs) doubles[name] = {values.begin(), values.end()};
  return doubles;
}

// Gradient of sum(formula * weights) by one of the inputs.
std::vector<double> difference(const Formula &formula, Doubles inputs, const std::string &name, const Values &weights) {
  auto value = [&] {
    double sum = 0;
    const std::vector<double> y = formula(inputs);
    for (size_t i = 0; i < y.size(); i++) sum += y[i] * weights[i];
    return sum;
  };
  std::vector<double> gradient;
  for (double &x : inputs[name]) {
    const double kept = x, step = 1e-5;
    x = kept + step;
    const double above = value();
    x = kept - step;
    gradient.push_back((above - value()) / (2 * step));
    x = kept;
  }
  return gradient;
}

void compare(const std::string &kernel, const Formula &formula, const Inputs &inputs, const Values &weights,
             const std::map<std::string, Values *> &gradients) {
  for (auto &[name, value] : gradients)
    report(kernel + ", gradient of " + name, relative(*value, difference(formula, widen(inputs), name, weights)), 2e-4);
}

void check_scan(int64_t B, int64_t L, int64_t E, int64_t N, int64_t R, int64_t threads) {
  Inputs in;
  for (std::string d : {"f", "b"}) {
    in["x" + d] = draw(B * L * E);
    in["p" + d] = draw(B * L * (R + 2 * N), 0.7f);
    in["w" + d] = draw(E * R, 0.3f);
    in["t" + d] = draw(E, 0.3f, -1.f);
    in["A" + d] = draw(E * N, 0.3f, -1.f);
    in["D" + d] = draw(E);
  }
  in["z"] = draw(B * L * E);
  const Formula formula = [=](const Doubles &v) {
    std::vector<double> y(B * L * E);
    for (int d = 0; d < 2; d++) {
      const std::string s = d ? "b" : "f";
      const int64_t width = R + 2 * N;
      for (int64_t b = 0; b < B; b++)
        for (int64_t e = 0; e < E; e++) {
          std::vector<double> h(N, 0.);
          for (int64_t k = 0; k < L; k++) {
            const int64_t row = b * L + (d ? L - 1 - k : k);
            const double *p = &v.at("p" + s)[row * width], x = v.at("x" + s)[row * E + e];
            double dt = v.at("t" + s)[e], sum = v.at("D" + s)[e] * x;
            for (int64_t r = 0; r < R; r++) dt += v.at("w" + s)[e * R + r] * p[r];
            dt = std::log1p(std::exp(dt));
            for (int64_t n = 0; n < N; n++) {
              h[n] = std::exp(dt * v.at("A" + s)[e * N + n]) * h[n] + dt * x * p[R + n];
              sum += h[n] * p[R + N + n];
            }
            const double z = v.at("z")[row * E + e];
            y[row * E + e] += 0.5 * sum * z * sigmoid_of(z);
          }
        }
    }
    return y;
  };

  const int64_t width = R + 2 * N;
  Values out(B * L * E), y_sum(B * L * E), grad = draw(B * L * E), dz(B * L * E);
  Buffer<float> states(2 * B * mambascope_states_size(L, E, N) + 1);
  std::map<std::string, Values> g;
  BackwardArgs back{};
  back.shape = {B, L, E, N, R, 1, 0, threads};
  for (int d = 0; d < 2; d++) {
    const std::string s = d ? "b" : "f";
    const float *p = in["p" + s].data();
    back.dir[d] = {in["x" + s].data(), p, p + R, p + R + N, in["A" + s].data(), in["D" + s].data(), in["w" + s].data(),
                   in["t" + s].data(), L * E, E, L * width, width, L * width, width, L * width, width, d};
    for (std::string name : {"x", "p", "w", "t", "A", "D"}) g[name + s] = Values(in[name + s].size());
    float *dp = g["p" + s].data();
    back.out[d] = {g["x" + s].data(), dp, dp + R, dp + R + N, width, width, width,
                   g["A" + s].data(), g["D" + s].data(), g["w" + s].data(), g["t" + s].data()};
  }
  back.directions = 2;
  back.z = in["z"].data();
  back.z_batch = L * E, back.z_row = E, back.scale = 0.5;
  ForwardArgs forward{};
  forward.shape = back.shape, forward.dir[0] = back.dir[0], forward.dir[1] = back.dir[1], forward.directions = 2;
  forward.z = back.z, forward.z_batch = L * E, forward.z_row = E, forward.scale = 0.5;
  forward.out = out.data(), forward.y_sum = y_sum.data(), forward.states = states.get();
  const std::string name = "scan " + std::to_string(L) + "x" + std::to_string(E) + "x" + std::to_string(N);
  if (mambascope_scan_forward(&forward)) failures++;
  report(name, relative(out, formula(widen(in))), 1e-5);

  Buffer<float> packed(mambascope_scan_packed_size(&forward));
  Values again(B * L * E);
  if (mambascope_scan_pack(&forward, packed.get())) failures++;
  forward.packed = packed.get(), forward.states = nullptr, forward.out = again.data();
  if (mambascope_scan_forward(&forward)) failures++;
  report(name + ", packed", relative(again, out), 1e-7);

  back.grad = grad.data(), back.grad_batch = L * E, back.grad_row = E;
  back.y_sum = y_sum.data(), back.states = states.get(), back.dz = dz.data();
  if (mambascope_scan_backward(&back)) failures++;
  std::map<std::string, Values *> gradients{{"z", &dz}};
  for (auto &[key, value] : g) gradients[key] = &value;
  compare(name, formula, in, grad, gradients);
}

void check_conv(int64_t B, int64_t L, int64_t E, int64_t taps, int64_t threads) {
  Inputs in{{"x", draw(B * L * E)}};
  for (std::string d : {"0", "1"}) in["w" + d] = draw(E * taps), in["b" + d] = draw(E);
  const int64_t plane = B * L * E;
  const Formula formula = [=](const Doubles &v) {
    std::vector<double> y;
    for (int d = 0; d < 2; d++)
      for (int64_t b = 0; b < B; b++)
        for (int64_t l = 0; l < L; l++)
          for (int64_t e = 0; e < E; e++) {
            double sum = v.at("b" + std::to_string(d))[e];
            for (int64_t j = 0; j < taps; j++) {
              const int64_t at = d ? l + j : l - j;
              if (at >= 0 && at < L)
                sum += v.at("w" + std::to_string(d))[e * taps + taps - 1 - j] * v.at("x")[(b * L + at) * E + e];
            }
            y.push_back(sum * sigmoid_of(sum));
          }
    return y;
  };
  Values y(2 * plane), grad = draw(2 * plane), dx(plane), dw[2], db[2];
  ConvArgs a{};
  a.batch = B, a.length = L, a.channels = E, a.taps = taps, a.silu = 1, a.threads = threads, a.directions = 2;
  a.x = in["x"].data(), a.x_batch = L * E, a.x_row = E, a.reverse[1] = 1, a.dx = dx.data();
  for (int d = 0; d < 2; d++) {
    dw[d].resize(E * taps), db[d].resize(E);
    a.weight[d] = in["w" + std::to_string(d)].data(), a.bias[d] = in["b" + std::to_string(d)].data();
    a.y[d] = y.data() + d * plane, a.grad[d] = grad.data() + d * plane, a.grad_batch[d] = L * E, a.grad_row[d] = E;
    a.dweight[d] = dw[d].data(), a.dbias[d] = db[d].data();
  }
  const std::string name = "conv " + std::to_string(L) + "x" + std::to_string(E) + ", taps " + std::to_string(taps);
  if (mambascope_conv_forward(&a) || mambascope_conv_backward(&a)) failures++;
  report(name, relative(y, formula(widen(in))), 1e-5);
  compare(name, formula, in, grad, {{"x", &dx}, {"w0", &dw[0]}, {"w1", &dw[1]}, {"b0", &db[0]}, {"b1", &db[1]}});
}

void check_norm(int64_t rows, int64_t width, int64_t threads) {
  Inputs in{{"hidden", draw(rows * width)}, {"residual", draw(rows * width)}, {"weight", draw(width)}};
  const Formula formula = [=](const Doubles &v) {
    std::vector<double> y;
    for (int64_t row = 0; row < rows; row++) {
      double square = 0;
      auto sum = [&](int64_t i) { return v.at("hidden")[row * width + i] + v.at("residual")[row * width + i]; };
      for (int64_t i = 0; i < width; i++) square += sum(i) * sum(i);
      for (int64_t i = 0; i < width; i++) y.push_back(sum(i) / std::sqrt(square / width + 1e-5) * v.at("weight")[i]);
    }
    return y;
  };
  Values normed(rows * width), sum(rows * width), rstd(rows), grad = draw(rows * width), dsum(rows * width), dw(width);
  NormArgs a{};
  a.rows = rows, a.width = width, a.threads = threads, a.eps = 1e-5;
  a.hidden = in["hidden"].data(), a.residual = in["residual"].data(), a.weight = in["weight"].data();
  a.normed = normed.data(), a.sum = sum.data(), a.rstd = rstd.data();
  a.grad = grad.data(), a.dsum = dsum.data(), a.dweight = dw.data();
  const std::string name = "norm " + std::to_string(rows) + "x" + std::to_string(width);
  if (mambascope_norm_forward(&a) || mambascope_norm_backward(&a)) failures++;
  report(name, relative(normed, formula(widen(in))), 1e-5);
  compare(name, formula, in, grad, {{"hidden", &dsum}, {"residual", &dsum}, {"weight", &dw}});
}

void check_gemm(int64_t rows, int64_t depth, int64_t columns, int64_t threads) {
  Values x = draw(rows * depth), weight = draw(columns * depth), out(rows * columns);
  std::vector<double> expected(rows * columns);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++)
      for (int64_t k = 0; k < depth; k++) expected[i * columns + j] += (double)x[i * depth + k] * weight[j * depth + k];
  Buffer<float> packed(mambascope_gemm_size(columns, depth));
  mambascope_gemm_pack(weight.data(), columns, depth, packed.get());
  const GemmArgs a{rows, depth, columns, threads, x.data(), depth, packed.get(), out.data(), columns};
  if (mambascope_gemm(&a)) failures++;
  report("product " + std::to_string(rows) + "x" + std::to_string(depth) + "x" + std::to_string(columns),
         relative(out, expected), 1e-5);
}

}  // namespace

int main() {
  printf("lanes %d\n", mambascope_lanes());
  for (int64_t threads : {1, 3}) {
    check_scan(2, 5, 2 * W + 1, 3, 2, threads);
    check_scan(1, 35, W, 8, 1, threads);
    check_scan(1, 4, 3, 17, 3, threads);
    check_conv(2, 6, W + 2, 4, threads);
    check_conv(1, 2, 3, 3, threads);
    check_norm(5, 2 * W + 3, threads);
    check_norm(17, 3, threads);
    check_gemm(TILE_ROWS + 2, 9, PANEL + 1, threads);
    check_gemm(1, 1, 1, threads);
  }
  printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures != 0;
}
