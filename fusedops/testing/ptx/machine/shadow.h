// What is known about each byte of shared memory: who wrote it last, who has read it since, and from these whether an
// access races with another one, reads what nobody wrote, or needs a proxy fence.
#pragma once
#include <array>

#include "memory.h"

namespace ptx {

// One access as it is remembered: 14 bits of agent, 26 of its clock, 20 of the instruction's index, 4 of flags.
// 0: none; the clock of an agent starts at 1.
using Epoch = uint64_t;
constexpr Epoch ASYNC_PROXY = 1, STRONG = 2;
constexpr unsigned MAX_AGENTS = 1 << 14;              // operations beyond are not followed

class Shadow;

// One access on its way through the shadow of one block.
class Touch {
  public:
    Touch(const Actor& actor, Block& block, Access access);
    bool needed() const { return shadow_; }
    void range(uint32_t offset, uint32_t bytes);      // throws Fault
    void lanes(Mask active, const uint32_t (&offsets)[LANES], uint32_t bytes);

  private:
    friend class Shadow;
    const Actor& actor_;
    Block& block_;
    const Agent& agent_;
    Shadow* shadow_ = nullptr;                        // none: nothing is checked
    Access access_;
    uint32_t checks_;
    Epoch epoch_;
    // What was found in order last: neighbours mostly have the same.
    Epoch fine_write_ = 0;
    uint32_t fine_reads_ = 0, reads_from_ = 0, reads_to_ = 0;
    bool suspected_ = false;

    bool ordered(Epoch earlier) const;
    void after_write(Epoch write, uint32_t offset, uint32_t count);
    void suspect(Epoch earlier, uint32_t offset, uint32_t count);
    void after_reads(uint32_t reads, uint32_t offset);
    std::string race(Epoch earlier, bool earlier_wrote, uint32_t offset) const;
    [[noreturn]] void unfenced(Epoch write, uint32_t offset) const;
    std::string name(Epoch epoch) const;
};

class Shadow {
  public:
    explicit Shadow(uint32_t bytes) : granules_((bytes + GRANULE - 1) / GRANULE) {}
    void touch(Touch& touch, uint32_t offset, uint32_t bytes);
    void settle(const Block& block);                  // what was suspected must have changed nothing; throws Fault

  private:
    friend class Touch;
    static constexpr uint32_t GRANULE = 16;           // bytes; what most accesses touch as a whole
    struct Cell {                                     // bytes with one history
        Epoch write = 0;
        uint32_t reads = 0;                           // a set of Epochs since that write, of reads_
    };
    struct Granule : Cell {
        uint32_t parts = 0;                           // of parts_: histories that differ; 0: one for all bytes
    };
    using Parts = std::array<Cell, GRANULE>;
    struct Transition {
        uint32_t from = 0, to = 0;
        Epoch epoch = 0;
    };
    std::vector<Granule> granules_;
    std::vector<Parts> parts_{1};
    std::vector<uint32_t> free_parts_;
    std::vector<std::vector<Epoch>> reads_{1};        // sets of reads; equal neighbours share one
    std::array<Transition, 1024> transitions_{};
    static constexpr size_t MANY_READS = 1 << 15;
    size_t most_reads_ = MANY_READS;                  // sets before those that no byte has any more are dropped

    // Two unordered writes are no race where they write the same: compilers let warps store what several of them hold.
    struct Suspect {
        uint32_t offset, count;
        std::array<uint8_t, GRANULE> before;
    };
    std::vector<Suspect> suspects_;                   // bytes of the last access that must stay as they were
    std::string suspicion_;                           // what to say if they did not

    void visit(Touch& touch, Cell& cell, uint32_t offset, uint32_t count);
    void visit_parts(Touch& touch, Granule& granule, uint32_t offset, uint32_t first, uint32_t count);
    void split(Granule& granule);
    void unite(Granule& granule);
    uint32_t with_read(const Touch& touch, uint32_t reads);
    void drop_unused_reads();
};

}  // namespace ptx
