// Attention to a memory of fixed size on the CPU: each key head of each sequence is one piece of work.
// A step of a small model is over before a second thread has begun.

#include "streaming.h"

#include <atomic>
#include <memory>

constexpr int64_t GRAIN = 1 << 20;  // multiply-adds for which a thread is worth its start

extern "C" int astroattn_stream(const StreamProblem* problem, const StreamTensors* tensors) try {
    const StreamProblem& p = *problem;
    const int64_t all = p.batch * p.heads, products = all * p.groups * p.tokens * p.entries * (p.dim + p.value_dim);
    const int64_t threads = std::min({p.threads, all, 1 + products / GRAIN});
    Arena need;
    Stream sample(p, *tensors, need);
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
    try {
        Memory memory(need.used);
        Arena arena{memory.data()};
        Stream stream(p, *tensors, arena);
        for (int64_t i = next++; i < all; i = next++) stream.run(i / p.heads, i % p.heads);
    } catch (...) {
        failed = true;
    }
    return failed ? 1 : 0;
} catch (...) {
    return 1;
}
