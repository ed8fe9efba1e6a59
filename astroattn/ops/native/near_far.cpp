// Near + far attention on the CPU: the mathematics of near_far.py, one head at a time in cache.
//
// For each head: mean queries u of the groups; their attention P to every key; weighted k-means of the keys; the keys
// that each group chooses; the sums of P and P v over each cluster; and, tile by tile, one softmax over the exact keys
// and the hidden neurons. P is the only thing of size groups x tokens; it is kept, because computing it again costs
// more.

#include <atomic>
#include <memory>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "backward.h"
#include "forward.h"

extern "C" int astroattn_near_far(const Problem* problem, const Tensors* tensors) try {
    int64_t size = problem->batch * problem->heads;
    int threads = int(problem->threads);
    // Whole heads for as many as the threads share evenly; the rest are worked on by all threads together.
    int64_t whole = size / threads * threads;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    Arena need;
    Forward sample(*problem, *tensors, need);
    size_t head_size = need.used;
    Head::Bench sample_room(sample, need);
    size_t room_size = need.used - head_size;
#pragma omp parallel num_threads(threads) if (whole && threads > 1)
    try {
        std::unique_ptr<Memory> memory;
        for (int64_t z = next++; z < whole; z = next++) {
            if (!memory) memory = std::make_unique<Memory>(need.used);
            Arena arena{memory->data()};
            Forward head(*problem, *tensors, arena);
            Head::Bench room(head, arena);
            head.begin(z);
            stages(head, [&](int64_t blocks, auto work) {
                for (int64_t i = 0; i < blocks; i++) work(i, room);
            });
        }
    } catch (...) {
        failed = true;
    }
    if (whole < size && !failed) {
        Memory memory(head_size + size_t(threads) * room_size);
        Arena arena{memory.data()};
        Forward head(*problem, *tensors, arena);
        std::vector<Head::Bench> rooms;
        for (int i = 0; i < threads; i++) rooms.emplace_back(head, arena);
        for (int64_t z = whole; z < size; z++) {
            head.begin(z);
            stages(head, [&](int64_t blocks, auto work) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (blocks > 1)
                for (int64_t i = 0; i < blocks; i++) {
#if defined(_OPENMP)
                    work(i, rooms[size_t(omp_get_thread_num())]);
#else
                    work(i, rooms[0]);
#endif
                }
            });
        }
    }
    return failed ? 1 : 0;
} catch (...) {
    return 1;
}

extern "C" int astroattn_near_far_backward(const Problem* problem, const Tensors* tensors,
                                           const Gradients* gradients) try {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    Arena need;
    Backward sample(*problem, *tensors, *gradients, need);
    Head::Bench sample_room(sample, need);
#pragma omp parallel num_threads(int(problem->threads)) if (problem -> threads > 1)
    try {
        std::unique_ptr<Memory> memory;
        for (int64_t z = next++; z < problem->batch * problem->heads; z = next++) {
            if (!memory) memory = std::make_unique<Memory>(need.used);
            Arena arena{memory->data()};
            Backward head(*problem, *tensors, *gradients, arena);
            Head::Bench room(head, arena);
            head.begin(z);
            head.run(room);
        }
    } catch (...) {
        failed = true;
    }
    return failed ? 1 : 0;
} catch (...) {
    return 1;
}
