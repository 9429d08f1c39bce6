// The threads of a call.
#pragma once
#include <cstdint>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

// Denormals cost hundreds of cycles on some machines and probabilities are full of them: flush results while we run.
class FlushDenormals {
#if defined(__SSE2__)
 public:
  FlushDenormals() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8000); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

template <class F>
void run_team(int threads, const F& body) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      FlushDenormals guard;
      body(omp_get_thread_num());
    }
    return;
  }
#endif
  (void)threads;
  FlushDenormals guard;
  body(0);
}

// A counter that hands out work; the barrier-free dynamic schedule of this core.
struct Counter {
  long next = 0;
  long take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
};

inline void barrier() {
#if defined(_OPENMP)
#pragma omp barrier
#endif
}

}  // namespace
