// Thirty-two lanes that share registers' places and run one instruction at a time, together where they can.
#pragma once
#include <memory>
#include <typeindex>

#include "clock.h"
#include "fault.h"
#include "program.h"

namespace ptx {

struct Block;
struct Cluster;
struct Launch;

// State that a file of instructions keeps with a warp, a block, a cluster or a launch, made at its first use.
class States {
  public:
    template <class T> T& get() {
        unsigned id = number<T>();
        if (id >= held_.size()) held_.resize(id + 1);
        if (!held_[id]) held_[id] = std::make_shared<T>();
        return *static_cast<T*>(held_[id].get());
    }
    template <class T> T* find() const {
        unsigned id = number<T>();
        return id < held_.size() ? static_cast<T*>(held_[id].get()) : nullptr;
    }

  private:
    static unsigned next() {
        static unsigned count = 0;
        return count++;
    }
    template <class T> static unsigned number() {
        static const unsigned mine = next();
        return mine;
    }
    std::vector<std::shared_ptr<void>> held_;
};

// Lanes of a warp that stand at the same instruction.
struct Group {
    uint32_t pc = 0;
    Mask mask = 0;
    bool blocked = false;            // its instruction said Wait in this turn
    bool arrived = false;            // for handlers that arrive once and then wait; groups do not merge meanwhile
    uint64_t ticket = 0;             // what the handler needs to know when it is called again
    std::string waiting;             // filled when a deadlock is explained
};

struct Warp {
    Block& block;
    const Code& code;
    const unsigned index;            // in the block
    const Mask existing;             // lanes that the block has; fewer than 32 only in its last warp
    Mask alive;                      // lanes that have not exited
    std::vector<Group> groups;
    Group* group = nullptr;          // the one that runs now
    Agent agent;                     // of its memory accesses, for the search for races
    States states;

    Warp(Block& block, const Code& code, unsigned index, Mask existing);

    template <class T> T* values(const Slot& slot) { return reinterpret_cast<T*>(registers_ + slot.offset); }
    Mask& mask_of(const Slot& slot) { return *values<Mask>(slot); }
    Mask predicate(const Slot& slot) { return slot.negated ? ~mask_of(slot) : mask_of(slot); }
    void set_predicate(const Slot& slot, Mask value, Mask active) {
        mask_of(slot) = (mask_of(slot) & ~active) | (value & active);
    }
    uint64_t get(const Slot& slot, unsigned lane);                 // any width, zero-extended
    void set(const Slot& slot, unsigned lane, uint64_t bits);      // any width, cut off

    // Runs up to `quantum` instructions; returns whether anything was done.
    bool run(unsigned quantum);
    bool done() const { return alive == 0; }

    // For handlers.
    Step jump(Mask taken, uint32_t target);                        // lanes of the current group
    Step exit(Mask lanes);
    // Whether every lane of `wanted` that has not exited stands here. If not, say `wait`.
    bool together(Mask wanted, Mask active) const { return (wanted & alive & ~active) == 0; }
    template <class Explain> Step wait(Explain explain);           // explain() says for what, as a std::string
    Step wait_for_lanes(const Instruction&, Mask wanted, Mask active);
    // All 32 lanes, or a Fault or a Wait: what ".aligned" asks for. Next: they are here.
    Step aligned(const Instruction&, Mask active);

    Launch& launch() const;
    Cluster& cluster() const;
    std::string describe_waiting() const;
    std::string place(const Instruction&) const;                   // for messages: kernel, block, warp, lines

  private:
    std::unique_ptr<uint8_t[]> storage_;
    uint8_t* registers_;
    uint64_t random_ = 0;
    void preset();
    uint64_t special(const std::string& name, unsigned lane) const;
    Group* choose();
    void merge();
    Step execute(const Instruction&);
};

// Calls f(lane) for the lanes of a mask; a full warp is a plain loop that the compiler turns into vectors.
template <class F> inline void each_lane(Mask mask, F f) {
    if (mask == ALL) {
#pragma GCC ivdep
        for (unsigned lane = 0; lane < LANES; lane++) f(lane);
    } else {
        for (; mask; mask &= mask - 1) f((unsigned)__builtin_ctz(mask));
    }
}

}  // namespace ptx
