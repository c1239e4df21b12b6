// A stack of blocks as one call: steps of the other kernels on buffers that stay between calls.
//
// A lane of work is one set of buffers for a few images.  With one lane each step shares its work among the threads; with
// several, every thread takes the next images through all steps on its own, and they never wait for each other.
#pragma once

#include "conv.h"
#include "gemm.h"
#include "norm.h"
#include "scan_forward.h"

namespace {

struct AddArgs {
  int64_t count;
  const float *a, *b;
  float *out;
};

enum StepKind : int64_t { SCAN, CONV, NORM, GEMM, ADD };

struct Step {
  int64_t kind;
  const void *args;
};

struct Port {
  char *buffer;   // of a lane of work, `images_per_pass` images
  int64_t bytes;  // of one image
};

struct ProgramArgs {
  int64_t images, images_per_pass, lanes, steps, outputs;
  const char *input;
  const Step *step;      // [lanes][steps]
  const Port *entrance;  // [lanes]
  const Port *exit;      // [lanes][outputs]
  char *const *output;   // [outputs]
};

inline void run_step(const Step &step) {
  switch (step.kind) {
    case SCAN: {
      const ForwardArgs &a = *(const ForwardArgs *)step.args;
      states_per_pass(a.shape.states) == 16 ? ForwardScan<float, 16>(a).run() : ForwardScan<float, 8>(a).run();
      break;
    }
    case CONV:
      Conv<float>(*(const ConvArgs *)step.args).forward();
      break;
    case NORM:
      norm_forward<float, float>(*(const NormArgs *)step.args);
      break;
    case GEMM:
      gemm(*(const GemmArgs *)step.args);
      break;
    case ADD: {
      const AddArgs &a = *(const AddArgs *)step.args;
      for (int64_t i = 0; i < a.count; i++) a.out[i] = a.a[i] + a.b[i];
      break;
    }
  }
}

inline void run_program(const ProgramArgs &p) {
  const int64_t passes = (p.images + p.images_per_pass - 1) / p.images_per_pass;
  std::atomic<int64_t> next{0};
  run_threads(usable_threads(p.lanes, passes), [&](int lane, int) {
    for (int64_t pass; (pass = next.fetch_add(1, std::memory_order_relaxed)) < passes;) {
      // equal passes; a lane's buffers may hold one image more, which is computed from what was left there
      const int64_t first = p.images * pass / passes, count = p.images * (pass + 1) / passes - first;
      const Port &in = p.entrance[lane];
      memcpy(in.buffer, p.input + first * in.bytes, count * in.bytes);
      for (int64_t i = 0; i < p.steps; i++) run_step(p.step[lane * p.steps + i]);
      for (int64_t i = 0; i < p.outputs; i++) {
        const Port &out = p.exit[lane * p.outputs + i];
        memcpy(p.output[i] + first * out.bytes, out.buffer, count * out.bytes);
      }
    }
  });
}

}  // namespace
