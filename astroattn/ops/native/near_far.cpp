// Near + far attention on the CPU: the mathematics of near_far.py, one head at a time in cache.
//
// For each head: coordinates of its queries and keys; tiles of queries that ask for the same; their mean queries'
// logits with every key; weighted k-means of the keys; the keys that each sub-tile chooses; and, tile by tile, the sums
// over the clusters and one softmax for each query. The logits are the only thing of size
// tiles x tokens; they are kept, because computing them again costs more.

#include <atomic>
#include <memory>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "backward.h"
#include "forward.h"

extern "C" int astroattn_near_far(const Problem* problem, const Tensors* tensors) try {
    const int64_t size = problem->batch * problem->heads, threads = problem->threads;
    // Whole heads for as many as the threads share evenly; the rest are worked on by all threads together.
    const int64_t whole = size / threads * threads;
    Arena need;
    Forward sample(*problem, *tensors, need);
    const size_t head_size = need.used;
    Forward::Bench sample_room(sample, need);
    const size_t room_size = need.used - head_size;
    // Memory is taken before the threads start, because an exception must not leave one of them waiting for another.
    std::vector<std::unique_ptr<Memory>> own;
    for (int64_t i = 0; i < (whole ? threads : 0); i++) own.push_back(std::make_unique<Memory>(need.used));
    std::unique_ptr<Memory> common;
    if (whole < size) common = std::make_unique<Memory>(head_size + size_t(threads) * room_size);
    Arena arena{common ? common->data() : nullptr};
    Forward shared(*problem, *tensors, arena);
    std::vector<Forward::Bench> rooms;
    for (int64_t i = 0; i < (common ? threads : 0); i++) rooms.emplace_back(shared, arena);
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
    {
#if defined(_OPENMP)
        const size_t me = size_t(omp_get_thread_num());
#else
        const size_t me = 0;
#endif
        for (int64_t z = next++; z < whole; z = next++) {
            Arena mine{own[me]->data()};
            Forward head(*problem, *tensors, mine);
            Forward::Bench room(head, mine);
            head.begin(z);
            stages(head, [&](int64_t blocks, auto work) {
                for (int64_t i = 0; i < blocks; i++) work(i, room);
            });
        }
        for (int64_t z = whole; z < size; z++) {
#pragma omp single
            shared.begin(z);
            stages(shared, [&](int64_t blocks, auto work) {
#pragma omp for schedule(dynamic)
                for (int64_t i = 0; i < blocks; i++) work(i, rooms[me]);
            });
        }
    }
    return 0;
} catch (...) {
    return 1;
}

extern "C" int astroattn_near_far_backward(const Problem* problem, const Tensors* tensors,
                                           const Gradients* gradients) try {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    Arena need;
    Backward sample(*problem, *tensors, *gradients, need);
    Backward::Bench sample_room(sample, need);
#pragma omp parallel num_threads(int(problem->threads)) if (problem -> threads > 1)
    try {
        std::unique_ptr<Memory> memory;
        for (int64_t z = next++; z < problem->batch * problem->heads; z = next++) {
            if (!memory) memory = std::make_unique<Memory>(need.used);
            Arena arena{memory->data()};
            Backward head(*problem, *tensors, *gradients, arena);
            Backward::Bench room(head, arena);
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
