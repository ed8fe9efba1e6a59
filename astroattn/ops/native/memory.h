// Working memory: one block for a head, kept for the next call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "vectors.h"

// One block of memory, cut into arrays. Without a block it only counts what is needed.
struct Arena {
    char* block = nullptr;
    size_t used = 0;
    template <typename T>
    void take(T*& array, int64_t count) {
        array = block ? reinterpret_cast<T*>(block + used) : nullptr;
        used += size_t(round_up(count * int64_t(sizeof(T)), 64));
    }
};

// Fresh memory costs a page fault for every 4 KB, as much time as the arithmetic. So blocks are kept for the next call,
// as many as there are threads, none larger than this.
constexpr size_t LARGEST_KEPT = size_t(32) << 20, LARGE_PAGE = size_t(2) << 20;
struct Block {
    char* data;
    size_t size;
};
inline std::mutex kept_lock;
inline std::vector<Block> kept;
inline std::atomic<bool> spoils{false};  // whether a block is handed out full of NaN, as in our tests

class Memory {
    Block block{nullptr, 0};

public:
    explicit Memory(size_t size) {
        if (!take_kept(size)) allocate(size);
        if (spoils) memset(block.data, 0xff, block.size);
    }
    Memory(const Memory&) = delete;
    ~Memory() {
        std::lock_guard<std::mutex> guard(kept_lock);
        size_t most = std::max<size_t>(1, std::thread::hardware_concurrency());
        if (block.size > LARGEST_KEPT) std::free(block.data);
        else if (kept.size() < most) kept.push_back(block);
        else {  // the smallest goes
            auto least = std::min_element(kept.begin(), kept.end(), [](Block a, Block b) { return a.size < b.size; });
            if (least->size < block.size) std::swap(*least, block);
            std::free(block.data);
        }
    }
    char* data() const { return block.data; }

private:
    bool take_kept(size_t size) {
        std::lock_guard<std::mutex> guard(kept_lock);
        for (size_t i = 0; i < kept.size(); i++)
            if (kept[i].size >= size) {
                block = kept[i];
                kept.erase(kept.begin() + int64_t(i));
                return true;
            }
        return false;
    }
    void allocate(size_t size) {
        const size_t page = size > LARGE_PAGE ? LARGE_PAGE : 4096;
        size = size_t(round_up(int64_t(size), int64_t(page)));
        block = {static_cast<char*>(std::aligned_alloc(page, size)), size};
        if (!block.data) throw std::bad_alloc();
#if defined(__linux__)
        if (page == LARGE_PAGE) madvise(block.data, size, MADV_HUGEPAGE);  // a wish: its refusal costs only time
#endif
    }
};
