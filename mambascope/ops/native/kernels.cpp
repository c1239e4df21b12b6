// C entry points of the CPU kernels.  No torch and no Python headers: pointers, sizes and strides come in flat structs.
// Built once per instruction-set level; see setup.py.

#include "conv.h"
#include "gemm.h"
#include "norm.h"
#include "program.h"
#include "scan_backward.h"
#include "scan_forward.h"

namespace {

enum Status { OK = 0, OUT_OF_MEMORY = 1, NO_THREADS = 2 };

template <class F> int guarded(F f) {
  try {
    f();
  } catch (const std::bad_alloc &) {
    return OUT_OF_MEMORY;
  } catch (...) {  // a thread that could not be started
    return NO_THREADS;
  }
  return OK;
}

template <class S> void scan_forward(const ForwardArgs &a) {
  if (states_per_pass(a.shape.states) == 16)
    ForwardScan<S, 16>(a).run();
  else
    ForwardScan<S, 8>(a).run();
}

}  // namespace

#define MS_EXPORT __attribute__((visibility("default")))

extern "C" {

// Highest x86-64 level of this machine (1, 3 or 4; operating-system support included); 0 elsewhere.
MS_EXPORT int mambascope_cpu_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))) return 1;
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? 4 : 3;
#else
  return 0;
#endif
}

MS_EXPORT int mambascope_openmp() {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

MS_EXPORT int mambascope_lanes() { return W; }

// Sizes of the argument structs: the loader compares them with what it packs.
MS_EXPORT int mambascope_struct_size(int which) {
  const size_t sizes[] = {sizeof(ForwardArgs), sizeof(BackwardArgs), sizeof(ConvArgs), sizeof(NormArgs),
                          sizeof(GemmArgs),    sizeof(AddArgs),      sizeof(ProgramArgs)};
  return which >= 0 && which < 7 ? (int)sizes[which] : -1;
}

// Floats that one direction and batch entry saves for the backward pass.
MS_EXPORT int64_t mambascope_states_size(int64_t length, int64_t channels, int64_t states) {
  return (Chunks(length).count - 1) * round_up(channels, W) * round_up(states, states_per_pass(states));
}

MS_EXPORT int mambascope_scan_forward(const ForwardArgs *a) {
  return guarded([&] { a->shape.bfloat16 ? scan_forward<bf16>(*a) : scan_forward<float>(*a); });
}

MS_EXPORT int mambascope_scan_backward(const BackwardArgs *a) {
  return guarded([&] { a->shape.bfloat16 ? BackwardScan<bf16>(*a).run() : BackwardScan<float>(*a).run(); });
}

MS_EXPORT int mambascope_conv_forward(const ConvArgs *a) {
  return guarded([&] { a->bfloat16 ? Conv<bf16>(*a).forward() : Conv<float>(*a).forward(); });
}

MS_EXPORT int mambascope_conv_backward(const ConvArgs *a) {
  return guarded([&] { a->bfloat16 ? Conv<bf16>(*a).backward() : Conv<float>(*a).backward(); });
}

MS_EXPORT int mambascope_norm_forward(const NormArgs *a) {
  return guarded([&] {
    if (a->hidden_bfloat16)
      a->normed_bfloat16 ? norm_forward<bf16, bf16>(*a) : norm_forward<bf16, float>(*a);
    else
      a->normed_bfloat16 ? norm_forward<float, bf16>(*a) : norm_forward<float, float>(*a);
  });
}

MS_EXPORT int mambascope_norm_backward(const NormArgs *a) {
  return guarded([&] { a->normed_bfloat16 ? norm_backward<bf16>(*a) : norm_backward<float>(*a); });
}

// Floats of a packed weight [columns, depth], and its packing.
MS_EXPORT int64_t mambascope_gemm_size(int64_t columns, int64_t depth) { return gemm_panels(columns) * PANEL * depth; }
MS_EXPORT void mambascope_gemm_pack(const float *weight, int64_t columns, int64_t depth, float *out) {
  gemm_pack(weight, columns, depth, out);
}

// Floats of the packed parameters of a forward scan, and their packing; batch and length do not matter.
MS_EXPORT int64_t mambascope_scan_packed_size(const ForwardArgs *a) {
  return PackedParameters::size(a->shape, a->directions) * W;
}
MS_EXPORT int mambascope_scan_pack(const ForwardArgs *a, float *out) {
  return guarded([&] {
    const PackedParameters packed(a->shape, a->dir, a->directions, 1, out);
    packed.pack(a->shape, a->dir, a->directions, 1, (vf *)out);
  });
}

MS_EXPORT int mambascope_gemm(const GemmArgs *a) {
  return guarded([&] { gemm(*a); });
}

MS_EXPORT int mambascope_program(const ProgramArgs *a) {
  return guarded([&] { run_program(*a); });
}
}
