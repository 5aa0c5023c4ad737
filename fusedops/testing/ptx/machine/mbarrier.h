// Barriers in shared memory that count arrivals and bytes. PTX ISA 9.7.13.15.
#pragma once
#include "launch.h"

namespace ptx {

struct MBarrier {
    uint32_t rank = 0, offset = 0;   // the block of the cluster that holds it, and where
    bool valid = false;
    uint32_t expected = 0;           // arrivals of a phase
    uint32_t pending = 0;            // those that this phase still waits for
    int64_t bytes = 0;               // the tx-count: announced and not yet here; negative: here and not yet announced
    uint64_t phase = 0;              // phases completed
    bool carried = false;            // this phase: bytes have come
    bool unseen = false;             // the last phase: bytes have come, and nobody has waited for it
    Clock arriving;                  // what this phase's arrivals know
    Clock done;                      // what those of the last completed phase knew
};

constexpr int64_t MAX_BYTES = (1 << 20) - 1;

// The one at a shared or generic address; throws Fault where none is, or something else was written over it.
MBarrier& mbarrier_at(const Actor& actor, Space space, uint64_t address);

// What happens to it. `agent` releases what it did; nullptr: it does not (.relaxed).
void arrive(const Actor& actor, MBarrier& barrier, uint32_t count, Agent* agent);
void expect_bytes(const Actor& actor, MBarrier& barrier, int64_t bytes);
void complete_bytes(const Actor& actor, MBarrier& barrier, int64_t bytes, Agent* agent);

std::string describe(const MBarrier& barrier);

}  // namespace ptx
