// Attention to a memory of fixed size on the CPU: each key head of each sequence is one piece of work.

#include "streaming.h"

#include <atomic>
#include <memory>

extern "C" int astroattn_stream(const StreamProblem* problem, const StreamTensors* tensors) try {
    const StreamProblem& p = *problem;
    const int64_t all = p.batch * p.heads;
    Arena need;
    Stream sample(p, *tensors, need);
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(int(std::min(p.threads, all))) if (p.threads > 1 && all > 1)
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
