// Memory as a kernel sees it: spaces, bounds, and who may touch what. Global addresses are the host's own.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "clock.h"
#include "program.h"

namespace ptx {

struct Block;
struct Cluster;
struct Launch;
class Shadow;

enum class Space { Generic, Global, Shared, Local, Const, Param };
// Strong: ld and st with .volatile, .relaxed, .acquire or .release. Strong accesses and atomics do not race with each
// other, plain ones race with both.
enum class Access { Read, Write, Atomic, StrongRead, StrongWrite };
inline bool reads(Access access) { return access != Access::Write && access != Access::StrongWrite; }
inline bool writes(Access access) { return access != Access::Read && access != Access::StrongRead; }
inline bool strong(Access access) { return access >= Access::Atomic; }

// Generic addresses of the spaces that are not the host's. Shared: offset in the block, or (rank + 1) << 24 | offset
// for a block of the cluster, as mapa gives it.
constexpr uint64_t SHARED_WINDOW = 1ull << 56, LOCAL_WINDOW = 2ull << 56, PARAM_WINDOW = 3ull << 56;
constexpr unsigned WINDOW_SHIFT = 56, RANK_SHIFT = 24;
constexpr unsigned MAX_SHARED = 227 * 1024;

// Who touches memory, for checks and for messages.
struct Actor {
    Warp* warp;
    const Instruction* instruction;
    int lane = -1;                   // -1: the warp as a whole
    const Agent* agent = nullptr;    // nullptr: the warp's own
    bool async_proxy = false;        // TMA and wgmma see what generic stores wrote only after a fence
};

struct Bits128 {
    uint64_t low, high;
    bool operator==(const Bits128& other) const { return low == other.low && high == other.high; }
    bool operator!=(const Bits128& other) const { return !(*this == other); }
};

struct Allocation {
    uint64_t begin, end;
    std::string name;
    bool writable;
};

// The shared memory of one block.
struct SharedMemory {
    std::vector<uint8_t> bytes;
    std::shared_ptr<Shadow> shadow;  // what the checks keep about each byte; made at the first access

    void resize(unsigned size);
};

class Memory {
  public:
    explicit Memory(const Program& program);
    void allow(Allocation allocation);

    // The host's place of `bytes` at an address, after every check that applies; throws Fault with the reason.
    // `align` is in bytes; addresses in a Shared, Param or Local space are offsets there.
    uint8_t* at(const Actor& actor, Space space, uint64_t address, unsigned bytes, unsigned align, Access access);
    // The same for the lanes of a warp at once. Lanes that are not `active` must have the address of one that is
    // (lane_addresses sees to it); their places mean nothing.
    void at(const Actor& actor, Mask active, Space space, const uint64_t (&addresses)[LANES], unsigned bytes,
            unsigned align, Access access, uint8_t* (&places)[LANES]);

    // "12 bytes past the end of 'x' (400 bytes)", and the like.
    std::string nearest(uint64_t address, uint64_t bytes) const;

  private:
    std::vector<Allocation> allocations_;
    uint32_t hints_[256] = {};                // by instruction: the allocation that it hit last
    bool global(const Actor& actor, uint64_t address, uint64_t bytes, Access access);
    void refuse_global(const Actor& actor, uint64_t address, uint64_t bytes, Access access);
    bool shared(const Actor& actor, Mask active, const uint64_t (&addresses)[LANES], unsigned bytes, Access access,
                uint8_t* (&places)[LANES]);
};

// Calls f(begin, end) for what the lanes of a mask touch, with neighbours in address as one range.
template <class T, class F> void each_range(Mask active, const T (&addresses)[LANES], unsigned bytes, F f) {
    T begin = 0, end = 0;
    for (; active; active &= active - 1) {
        T at = addresses[__builtin_ctz(active)];
        if (at == end && end > begin) {
            end += bytes;
        } else if (at < begin || at + bytes > end) {
            if (end > begin) f(begin, end);
            begin = at, end = at + bytes;
        }
    }
    if (end > begin) f(begin, end);
}

// Base register + offset of each lane; lanes that are not active get the address of one that is.
void lane_addresses(Warp& warp, const Slot& base, int64_t offset, Mask active, uint64_t (&addresses)[LANES]);

// The block that a shared address names, seen from another block of its cluster; throws Fault.
Block& block_of(const Actor& actor, uint64_t address);
inline uint32_t shared_offset(uint64_t address) { return address & ((1u << RANK_SHIFT) - 1); }

void settle_writes(Cluster& cluster); // when it has ended: races that only the values written could tell
void proxy_fence(Warp& warp);         // fence.proxy.async: what the warp knows of generic writes, TMA and wgmma now see
void memory_fence(Warp& warp);        // fence, membar: relaxed atomics that follow release, those before acquire

[[noreturn]] void fault(const Actor& actor, const std::string& why);   // with the thread, the block and the instruction

}  // namespace ptx
