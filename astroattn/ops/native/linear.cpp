// Linear attention on the CPU. Tokens are cut into chunks that do not depend on the number of threads, so neither do
// the results: each chunk writes a state of its own, the states are added up, and each chunk reads the sum.

#include "linear.h"

#include <atomic>
#include <memory>
#include <vector>

namespace {

int64_t chunk_of(int64_t tokens) { return std::clamp<int64_t>(round_up((tokens + 3) / 4, ROWS), 2 * ROWS, 21 * ROWS); }

// Calls work(room, head, first, last, number) for each chunk of each head, in parallel.
template <typename Work>
bool for_chunks(const LinearProblem& p, const LinearTensors& t, int64_t tokens, Work work) {
    const int64_t chunk = chunk_of(tokens), chunks = (tokens + chunk - 1) / chunk, all = p.batch * p.heads * chunks;
    Arena need;
    LinearRoom sample(p, t, need);
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(int(std::min(p.threads, all))) if (p.threads > 1 && all > 1)
    try {
        std::unique_ptr<Memory> memory;
        std::unique_ptr<LinearRoom> room;
        int64_t loaded = -1;
        for (int64_t i = next++; i < all; i = next++) {
            if (!room) {
                memory = std::make_unique<Memory>(need.used);
                Arena arena{memory->data()};
                room = std::make_unique<LinearRoom>(p, t, arena);
            }
            const int64_t head = i / chunks, first = i % chunks * chunk;
            if (loaded != p.weights_of(head)) room->load_weights(head);
            loaded = p.weights_of(head);
            work(*room, head, first, std::min(first + chunk, tokens), i);
        }
    } catch (...) {
        failed = true;
    }
    return !failed;
}

// Partial sums of each chunk, and their total for each head; one array where there is one chunk.
struct Parts {
    int64_t chunks, size;
    std::vector<float> own;
    float* total;

    Parts(int64_t heads, int64_t tokens, int64_t size, float* total)
        : chunks((tokens + chunk_of(tokens) - 1) / chunk_of(tokens)), size(size), total(total) {
        if (chunks > 1) own.resize(size_t(heads * chunks * size));
    }
    float* of(int64_t number) { return (chunks > 1 ? own.data() : total) + number * size; }
    void add_up(int64_t head) {
        if (chunks == 1) return;
        float* to = total + head * size;
        std::fill(to, to + size, 0.0f);
        for (int64_t c = 0; c < chunks; c++) {
            const float* from = of(head * chunks + c);
            for (int64_t i = 0; i < size; i++) to[i] += from[i];
        }
    }
};

}  // namespace

extern "C" int astroattn_linear(const LinearProblem* problem, const LinearTensors* tensors) try {
    const LinearProblem& p = *problem;
    const LinearTensors& t = *tensors;
    const int64_t heads = p.batch * p.heads, m = p.hidden, width = p.value_dim;
    Parts kv(heads, p.keys, m * width, t.kv_state), z(heads, p.keys, m, t.z_state), top(heads, p.keys, m, t.top);
    bool done = for_chunks(p, t, p.keys, [&](LinearRoom& room, int64_t head, int64_t first, int64_t last, int64_t i) {
        room.write(head, first, last);
        room.put_state(kv.of(i), z.of(i), top.of(i));
    });
    if (!done) return 1;
    for (int64_t head = 0; kv.chunks > 1 && head < heads; head++) {
        float* high = t.top + head * m;
        std::fill(high, high + m, LinearRoom::LEAST);
        for (int64_t i = head * kv.chunks; i < (head + 1) * kv.chunks; i++)
            for (int64_t j = 0; j < m; j++) high[j] = std::max(high[j], top.of(i)[j]);
        for (int64_t i = head * kv.chunks; i < (head + 1) * kv.chunks; i++)
            for (int64_t j = 0; j < m; j++) {  // measured from the same top before they are added
                const float fade = std::exp(top.of(i)[j] - high[j]);
                z.of(i)[j] *= fade;
                for (int64_t d = 0; d < width; d++) kv.of(i)[j * width + d] *= fade;
            }
        kv.add_up(head);
        z.add_up(head);
    }
    done = for_chunks(p, t, p.queries, [&](LinearRoom& room, int64_t head, int64_t first, int64_t last, int64_t) {
        room.load_state(t.kv_state + head * m * width, t.z_state + head * m, t.top + head * m);
        room.read(head, first, last);
    });
    return done ? 0 : 1;
} catch (...) {
    return 1;
}

extern "C" int astroattn_linear_backward(const LinearProblem* problem, const LinearTensors* tensors,
                                         const LinearGradients* gradients) try {
    const LinearProblem& p = *problem;
    const LinearTensors& t = *tensors;
    const LinearGradients& g = *gradients;
    const int64_t heads = p.batch * p.heads, m = p.hidden, width = p.value_dim, weights = g.d_weight ? m * p.dim : 0;
    std::vector<float> d_kv(size_t(heads * m * width)), d_z(size_t(heads * m)), of_queries(size_t(heads * weights)),
        of_keys(size_t(heads * weights));
    Parts kv(heads, p.queries, m * width, d_kv.data()), z(heads, p.queries, m, d_z.data());
    Parts query_weights(heads, p.queries, weights, of_queries.data()),
        key_weights(heads, p.keys, weights, of_keys.data());
    auto put_weights = [&](const LinearRoom& room, float* to) {
        for (int64_t j = 0; weights && j < m; j++)
            memcpy(to + j * p.dim, room.d_weight + j * room.dim, size_t(p.dim) * sizeof(float));
    };
    bool done =
        for_chunks(p, t, p.queries, [&](LinearRoom& room, int64_t head, int64_t first, int64_t last, int64_t i) {
            room.load_state(t.kv_state + head * m * width, t.z_state + head * m, t.top + head * m);
            room.read_backward(g, head, first, last);
            std::swap(room.kv, room.d_kv);
            std::swap(room.z, room.d_z);
            room.put_state(kv.of(i), z.of(i), nullptr);
            std::swap(room.kv, room.d_kv);
            std::swap(room.z, room.d_z);
            put_weights(room, query_weights.of(i));
        });
    if (!done) return 1;
    for (int64_t head = 0; head < heads; head++) {
        kv.add_up(head);
        z.add_up(head);
    }
    done = for_chunks(p, t, p.keys, [&](LinearRoom& room, int64_t head, int64_t first, int64_t last, int64_t i) {
        room.load_state(d_kv.data() + head * m * width, d_z.data() + head * m, t.top + head * m);
        room.write_backward(g, head, first, last);
        put_weights(room, key_weights.of(i));
    });
    if (!done) return 1;
    if (weights == 0) return 0;
    std::fill(g.d_weight, g.d_weight + p.weight_batches * p.heads * weights, 0.0f);
    for (int64_t head = 0; head < heads; head++) {
        query_weights.add_up(head);
        key_weights.add_up(head);
        float* to = g.d_weight + p.weights_of(head) * weights;
        for (int64_t i = 0; i < weights; i++)
            to[i] += of_queries[size_t(head * weights + i)] + of_keys[size_t(head * weights + i)];
    }
    return 0;
} catch (...) {
    return 1;
}
