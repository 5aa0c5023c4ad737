// Addresses to places: which space, which allocation, and whether the access is allowed.
#include "memory.h"

#include <algorithm>
#include <cstring>

#include "global_races.h"
#include "launch.h"
#include "shadow.h"

namespace ptx {

namespace {

Space space_of(uint64_t generic) {
    switch (generic >> WINDOW_SHIFT) {
    case 0: return Space::Global;
    case SHARED_WINDOW >> WINDOW_SHIFT: return Space::Shared;
    case LOCAL_WINDOW >> WINDOW_SHIFT: return Space::Local;
    case PARAM_WINDOW >> WINDOW_SHIFT: return Space::Param;
    default: return Space::Global;                    // of no allocation, so it is explained there
    }
}

const char* verb(Access access) {
    return access == Access::Atomic ? "atomic access" : writes(access) ? "write" : "read";
}

struct LocalMemory {                                  // of the lanes of a warp, one after the other
    std::vector<uint8_t> bytes;
};

uint8_t* local(const Actor& actor, unsigned lane, uint64_t address, unsigned bytes) {
    unsigned size = actor.warp->code.local_bytes;
    auto& memory = actor.warp->states.get<LocalMemory>();
    if (memory.bytes.empty()) memory.bytes.resize(size * LANES, 0xFF);
    if (address > size || bytes > size - address)
        fault(actor, format("local access of %u bytes at %llu, a thread has %u", bytes, (unsigned long long)address,
                            size));
    return memory.bytes.data() + lane * size + address;
}

uint8_t* parameter(const Actor& actor, uint64_t address, unsigned bytes) {
    auto& bank = actor.warp->launch().parameters;
    if (address > bank.size() || bytes > bank.size() - address)
        fault(actor, format("access of %u bytes at %llu, the parameters have %zu", bytes, (unsigned long long)address,
                            bank.size()));
    return bank.data() + address;
}

GlobalRaces* between_clusters(const Actor& actor) {   // nullptr: there is one cluster only, or nobody looks for races
    Launch& launch = actor.warp->launch();
    if (launch.grid.volume() == launch.cluster.volume() || !launch.checking(Checks::Races)) return nullptr;
    return &launch.states.get<GlobalRaces>();
}

[[noreturn]] void explain_shared(const Actor& actor, const Block& block, uint32_t offset, unsigned bytes,
                                 Access access) {
    unsigned size = block.shared.bytes.size();
    fault(actor, format("out of bounds: %s of %u bytes of shared memory at %u, %u bytes past its end (it has %u)",
                        verb(access), bytes, offset, offset >= size ? offset - size : offset + bytes - size, size));
}

}  // namespace

void fault(const Actor& actor, const std::string& why) {
    const Block& block = actor.warp->block;
    std::string who;
    if (actor.lane >= 0) {
        unsigned thread = actor.warp->index * LANES + actor.lane;
        who = format("thread %u of block (%u,%u,%u): ", thread, block.index.x, block.index.y, block.index.z);
    }
    throw Fault(who + why);
}

Block& block_of(const Actor& actor, uint64_t address) {
    uint64_t rank = address >> RANK_SHIFT;
    auto& blocks = actor.warp->cluster().blocks;
    if (rank == 0) return actor.warp->block;
    if (rank <= blocks.size()) return *blocks[rank - 1];
    if (uint32_t(address) == address && int32_t(address) < 0)
        fault(actor, format("out of bounds: shared memory %d bytes before its start", -int32_t(address)));
    fault(actor, format("out of bounds: shared address 0x%llx is in no block of the cluster",
                        (unsigned long long)address));
}

void SharedMemory::resize(unsigned size) { bytes.assign(size, 0xFF); }

void lane_addresses(Warp& warp, const Slot& base, int64_t offset, Mask active, uint64_t (&addresses)[LANES]) {
    if (base.bytes == 4) {
        const uint32_t* from = warp.values<uint32_t>(base);
        for (unsigned lane = 0; lane < LANES; lane++) addresses[lane] = uint32_t(from[lane] + (uint32_t)offset);
    } else {
        const uint64_t* from = warp.values<uint64_t>(base);
        for (unsigned lane = 0; lane < LANES; lane++) addresses[lane] = from[lane] + offset;
    }
    if (active == ALL) return;
    uint64_t one = addresses[__builtin_ctz(active)];
    for (unsigned lane = 0; lane < LANES; lane++) addresses[lane] = active >> lane & 1 ? addresses[lane] : one;
}

Memory::Memory(const Program& program) {
    for (auto& one : program.variables)
        allow({one.address(), one.address() + one.bytes(), one.declared->name, one.declared->space == "global"});
}

void Memory::allow(Allocation allocation) { allocations_.push_back(std::move(allocation)); }

void Memory::at(const Actor& actor, Mask active, Space space, const uint64_t (&addresses)[LANES], unsigned bytes,
                unsigned align, Access access, uint8_t* (&places)[LANES]) {
    uint64_t low = addresses[0], high = addresses[0], bits = 0;
    for (unsigned lane = 0; lane < LANES; lane++) {
        low = std::min(low, addresses[lane]), high = std::max(high, addresses[lane]);
        bits |= addresses[lane];
    }
    if (space == Space::Const) space = Space::Global;
    uint64_t window = space == Space::Generic ? low >> WINDOW_SHIFT : 0;
    bool uniform = space != Space::Generic || window == high >> WINDOW_SHIFT;
    if (space == Space::Generic) space = space_of(low);
    bool aligned = (bits & (align - 1)) == 0;
    if (uniform && aligned && space == Space::Global && window == 0 &&
        global(actor, low, high - low + bytes, access)) {
        if (GlobalRaces* races = between_clusters(actor))
            each_range(active, addresses, bytes, [&](uint64_t begin, uint64_t end) {
                races->touch(actor, begin, end, access);
            });
        for (unsigned lane = 0; lane < LANES; lane++) places[lane] = (uint8_t*)addresses[lane];
        return;
    }
    if (uniform && aligned && space == Space::Shared &&
        shared(actor, active, addresses, bytes, access, places))
        return;
    Space given = window || !uniform ? Space::Generic : space;
    for (Mask left = active; left; left &= left - 1) {
        Actor one = actor;
        one.lane = __builtin_ctz(left);
        places[one.lane] = at(one, given, addresses[one.lane], bytes, align, access);
    }
}

uint8_t* Memory::at(const Actor& actor, Space space, uint64_t address, unsigned bytes, unsigned align, Access access) {
    uint64_t given = address;
    if (space == Space::Generic) {
        space = space_of(address);
        if (space != Space::Global) address &= (1ull << WINDOW_SHIFT) - 1;
    }
    if (space == Space::Const) space = Space::Global;
    if (align > 1 && address % align) {
        std::string where = space == Space::Global ? "; " + nearest(address, bytes) : "";
        fault(actor, format("misaligned: %s of %u bytes at %s address 0x%llx, not a multiple of %u%s", verb(access),
                            bytes, space == Space::Global ? "global" : space == Space::Shared ? "shared" : "local",
                            (unsigned long long)given, align, where.c_str()));
    }
    switch (space) {
    case Space::Shared: {
        Block& block = block_of(actor, address);
        uint32_t offset = shared_offset(address);
        size_t size = block.shared.bytes.size();
        if (offset > size || bytes > size - offset) explain_shared(actor, block, offset, bytes, access);
        Touch(actor, block, access).range(offset, bytes);
        return block.shared.bytes.data() + offset;
    }
    case Space::Param: return parameter(actor, address, bytes);
    case Space::Local: return local(actor, std::max(actor.lane, 0), address, bytes);
    default:
        if (!global(actor, address, bytes, access)) refuse_global(actor, address, bytes, access);
        if (GlobalRaces* races = between_clusters(actor)) races->touch(actor, address, address + bytes, access);
        return (uint8_t*)address;
    }
}

bool Memory::global(const Actor& actor, uint64_t address, uint64_t bytes, Access access) {
    uint32_t checks = actor.warp->launch().checks;
    bool writable_only = writes(access) && (checks & Checks::ReadOnly);
    auto holds = [&](const Allocation& one) {
        return one.begin <= address && bytes <= one.end - one.begin && address <= one.end - bytes &&
               (one.writable || !writable_only);
    };
    uint32_t& hint = hints_[(uintptr_t)actor.instruction / sizeof(Instruction) % 256];
    if (hint < allocations_.size() && holds(allocations_[hint])) return true;
    for (size_t i = 0; i < allocations_.size(); i++)
        if (holds(allocations_[i])) {
            hint = i;
            return true;
        }
    return false;
}

bool Memory::shared(const Actor& actor, Mask active, const uint64_t (&addresses)[LANES], unsigned bytes, Access access,
                    uint8_t* (&places)[LANES]) {
    constexpr uint64_t IN_WINDOW = (1ull << WINDOW_SHIFT) - 1;
    uint64_t rank = (addresses[0] & IN_WINDOW) >> RANK_SHIFT, other_ranks = 0;
    uint32_t offsets[LANES], high = 0;
    for (unsigned lane = 0; lane < LANES; lane++) {
        other_ranks |= ((addresses[lane] & IN_WINDOW) >> RANK_SHIFT) ^ rank;
        offsets[lane] = shared_offset(addresses[lane]);
        high = std::max(high, offsets[lane]);
    }
    if (other_ranks || rank > actor.warp->cluster().blocks.size()) return false;
    Block& block = block_of(actor, addresses[0] & IN_WINDOW);
    if (high + (uint64_t)bytes > block.shared.bytes.size()) return false;
    Touch touch(actor, block, access);
    if (touch.needed()) touch.lanes(active, offsets, bytes);
    uint8_t* base = block.shared.bytes.data();
    for (unsigned lane = 0; lane < LANES; lane++) places[lane] = base + offsets[lane];
    return true;
}

// "4 bytes, 12 bytes past the end of 'x' (400 bytes)".
std::string Memory::nearest(uint64_t address, uint64_t bytes) const {
    const Allocation* best = nullptr;
    uint64_t least = UINT64_MAX;
    for (auto& one : allocations_) {
        uint64_t distance = address >= one.end ? address - one.end : address < one.begin ? one.begin - address : 0;
        if (distance < least) least = distance, best = &one;
    }
    if (!best) return "the kernel was given no memory";
    unsigned long long size = best->end - best->begin, before = best->begin - address, after = address - best->end;
    const char* name = best->name.c_str();
    if (address < best->begin) return format("%llu bytes before the start of '%s' (%llu bytes)", before, name, size);
    if (address >= best->end) return format("%llu bytes past the end of '%s' (%llu bytes)", after, name, size);
    unsigned long long inside = address - best->begin, over = address + bytes - best->end;
    if (address + bytes > best->end)
        return format("the last %llu of them past the end of '%s' (%llu bytes)", over, name, size);
    return format("%llu bytes into '%s' (%llu bytes)", inside, name, size);
}

void Memory::refuse_global(const Actor& actor, uint64_t address, uint64_t bytes, Access access) {
    constexpr uint64_t NULL_PAGE = 4096;
    unsigned long long where = address, count = bytes;
    Launch& launch = actor.warp->launch();
    for (auto& one : allocations_)
        if (launch.checking(Checks::ReadOnly) && writes(access) && !one.writable && one.begin <= address &&
            address + bytes <= one.end)
            fault(actor, format("writes to '%s', which is read-only: %llu bytes, %llu bytes into it", one.name.c_str(),
                                count, (unsigned long long)(address - one.begin)));
    if (!launch.checking(Checks::Bounds)) return;
    if (address < NULL_PAGE)
        fault(actor, format("null pointer: %s of %llu bytes at 0x%llx", verb(access), count, where));
    fault(actor, format("out of bounds: %s of %llu bytes of global memory, %s", verb(access), count,
                        nearest(address, bytes).c_str()));
}

}  // namespace ptx
