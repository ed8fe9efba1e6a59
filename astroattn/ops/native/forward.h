// Forward: what was chosen is read, tile by tile.
#pragma once

#include "choose.h"

struct Forward : Choose {
    using Choose::Choose;

    void attend_tiles(int64_t block, Bench& room) {
        sum_far(block, room);
        for (int64_t r = 0; r < tiles_of(block); r++) {
            const int64_t tile = block * TALL + r;
            begin_tile(tile, room);
            for (int64_t s = 0; s < subtiles_of(tile); s++) {
                const int64_t size = list_keys(tile, s, r, room);
                if (!attend_subtile(tile, s, size, room.sums[r], room))
                    attend_subtile(tile, s, size, sum_apart(tile, size, r, room), room);
            }
        }
    }

    // Returns false where digits would be lost: the sub-tile must be read again, through sums of its own.
    bool attend_subtile(int64_t tile, int64_t subtile, int64_t size, const Sums& x, Bench& room) {
        const int64_t m = hidden, first = subtile * SUBTILE, rows = std::min(SUBTILE, queries_of(tile) - first);
        const auto [wide, columns] = score(tile, subtile, size, x, room);
        float *scores = room.scores, *neurons = scores + SUBTILE * wide, *o[SUBTILE];
        vec top = spread(-3e38f);
        for (int64_t c = 0; c < SUBTILE * columns; c += LANES) top = larger(load(scores + c), top);
        top = largest_of_each(top);
        for (int64_t c = 0; c < SUBTILE * columns; c += LANES) store(scores + c, exponential(load(scores + c) - top));
        const quad clusters = weigh(neurons, x);
        quad exact = {};
        for (int64_t i = 0; i < size; i++) {
            quad weight = load_quad(scores + SUBTILE * i);
            if (m) weight -= load_quad(neurons + SUBTILE * room.owner[i]) * room.share[i];
            store_quad(scores + SUBTILE * i, weight);
            exact += weight;
        }
        const quad all = clusters + exact;
        if (loses_digits(clusters, all, rows, x, room)) return false;

        const float *zeros[SUBTILE], *so_far[SUBTILE];
        for (int64_t r = 0; r < SUBTILE; r++) {
            zeros[r] = room.zero_row;
            so_far[r] = o[r] = room.out + r * value_dim;
        }
        add_quad(scores, far_v, far_v_stride, value_dim, room.list, size, zeros, o);
        add_quad(neurons, x.s, value_dim, value_dim, nullptr, m, so_far, o);
        for (int64_t r = 0; r < rows; r++) {
            const int64_t n = tokens_of(tile)[first + r];
            const float factor = all[r] == 0 ? 0 : 1 / all[r];
            for (int64_t d = 0; d < value_dim; d += LANES) store(o[r] + d, load(o[r] + d) * factor);
            t.log_p[z * p.queries + n] = top[r] + std::log(all[r]);
            put_row(n, o[r]);
        }
        return true;
    }

    void attend_prefix(Bench& room) {
        const int rows = int(std::min(p.prefix, length));
        for (int r = 0; r < rows; r++) room.a[r] = q + r * dim;
        for (int64_t n = 0; n < padded; n += PANEL) {
            for (int r = 0; r < rows; r++) room.c[r] = room.scores + r * padded + n;
            dot_panel(rows, WIDE, room.a, panels + n * dim, dim, room.c);
        }
        for (int r = 0; r < rows; r++) {
            float* row = room.scores + r * padded;
            for (int64_t n = 0; t.bias && n < length; n++) row[n] += bias_of(r)[n];
            const float high = top_of(row, 0, length);
            vec all = {};
            std::fill(row + length, row + padded, -INFINITY);
            for (int64_t n = 0; n < length; n += LANES) {
                vec e = exponential(load(row + n) - high);
                store(row + n, e);
                all += e;
            }
            for (int64_t n = 0; n < length; n += LANES) store(row + n, load(row + n) / sum(all));
            t.log_p[z * p.queries + r] = high + std::log(sum(all));
            room.b[r] = row;
            room.o[r] = room.out + r * value_dim;
            std::fill(room.o[r], room.o[r] + value_dim, 0.0f);
        }
        add_rows(rows, room.b, v, v_stride, value_dim, length, room.o);
        for (int r = 0; r < rows; r++) put_row(r, room.o[r]);
    }

    void clear_padding(Bench& room) {
        for (int64_t n = real_queries(); n < p.queries; n++) {
            write_row(t.out, p.at(p.out_stride, z, n), Type(p.type), p.value_dim, room.zero_row);
            t.log_p[z * p.queries + n] = -INFINITY;
        }
    }

    void put_row(int64_t n, float* row) const {
        if (broken) {
            std::fill(row, row + value_dim, NAN);
            t.log_p[z * p.queries + n] = NAN;
        }
        write_row(t.out, p.at(p.out_stride, z, n), Type(p.type), p.value_dim, row);
    }
};

// The stages in order: blocks of a stage, and what a block does.
template <typename Run>
void stages(Forward& head, Run run) {
    const Problem& p = head.p;
    using Bench = Choose::Bench;
    auto tokens = [&](auto f) { run(head.token_blocks(), [&](int64_t i, Bench&) { f(i); }); };
    auto once = [&](auto f) { run(1, [&](int64_t, Bench&) { f(); }); };
    auto clusters = [&](auto f) { run(head.hidden, [&](int64_t i, Bench&) { f(i); }); };
    auto tiles = [&](auto f) { run(head.tile_blocks(), f); };

    tokens([&](int64_t i) { head.load_tokens(i); });
    run(head.panel_blocks(), [&](int64_t i, Bench&) { head.pack_keys(i, head.k, head.k_stride); });
    if (head.by_axes()) {
        once([&] { head.find_basis(); });
        tokens([&](int64_t i) { head.project_tokens(i); });
    }
    if (head.body && p.by_content) {
        once([&] { head.measure_keys(); });
        tokens([&](int64_t i) { head.place_points(i, head.asked, head.query_axes); });
        for (int64_t level = 0; level < head.levels; level++) {
            const int64_t first = head.level_start[level];
            run(head.level_start[level + 1] - first, [&](int64_t i, Bench& room) { head.split(first + i, room); });
        }
        run(1, [&](int64_t, Bench& room) { head.keep_neighbours(room); });
    }
    if (head.means()) tiles([&](int64_t i, Bench& room) { head.read_tiles(i, room); });
    if (head.hidden) {
        run(head.panel_blocks(), [&](int64_t i, Bench&) { head.join_masses(i, head.key_mass); });
        once([&] { head.measure_queries(); });
        tokens([&](int64_t i) { head.place_keys(i); });
        once([&] { head.start_learning(); });
        for (int64_t step = 0; step < p.steps; step++) {
            tokens([&](int64_t i) {
                head.assign(i);
                head.add_up(i);
            });
            once([&] { head.learn(); });
        }
        tokens([&](int64_t i) { head.assign(i); });
        once([&] {
            head.sort_keys();
            if (head.least_error > 0) head.measure_spread();
            if (head.t.bias) head.average_values();
        });
        clusters([&](int64_t j) { head.measure_cluster(j); });
        once([&] { head.pack_weights(); });
    }
    tiles([&](int64_t i, Bench& room) { head.choose_keys(i, room); });
    if (head.hidden) {
        run(head.panel_blocks(), [&](int64_t i, Bench&) { head.join_masses(i, head.mass); });
        clusters([&](int64_t j) { head.finish_cluster(j); });
    }
    once([&] { head.return_choices(); });
    run(head.tile_blocks() + 1, [&](int64_t i, Bench& room) {
        if (i < head.tile_blocks()) head.attend_tiles(i, room);
        else head.attend_prefix(room), head.clear_padding(room);
    });
}
