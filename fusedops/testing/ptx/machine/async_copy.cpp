// Copies of single threads from global to shared memory, in groups. PTX ISA 9.7.9.25.3.
#include <cstring>

#include "bulk.h"
#include "decoder.h"
#include "mbarrier.h"

namespace ptx {

namespace {

struct Copy {                        // one instruction of a warp
    const Instruction* issued;
    std::shared_ptr<Agent> agent;
    Mask lanes = 0;                  // that nobody has waited for
    Mask left = 0;                   // that are yet to be copied
    Mask handed = 0;                 // whose end an mbarrier tells
    uint32_t group[LANES];           // how many groups the thread had committed before
    uint64_t from[LANES], to[LANES];
    uint8_t bytes[LANES];            // that are read; the others are filled with zeros
    Clock done;
};

struct Copies {                      // of a warp
    std::vector<std::shared_ptr<Copy>> issued;
    uint32_t committed[LANES] = {};
};

void find_places(Memory& memory, const Actor& actor, Mask lanes, Space space, const uint64_t (&at)[LANES],
                 unsigned bytes, Access access, uint8_t* (&places)[LANES]) {
    uint64_t addresses[LANES];                        // lanes that do not take part repeat one that does
    for (unsigned lane = 0; lane < LANES; lane++)
        addresses[lane] = at[lanes >> lane & 1 ? lane : (unsigned)__builtin_ctz(lanes)];
    memory.at(actor, lanes, space, addresses, bytes, bytes, access, places);
}

void perform(Warp& warp, Copy& copy, Mask due) {
    due &= copy.left;
    if (!due) return;
    Memory& memory = warp.launch().memory;
    const Instruction& i = *copy.issued;
    const unsigned size = i.number[2];
    copy.left &= ~due;
    Mask whole = 0;                                   // the lanes that read all their bytes
    each_lane(due, [&](unsigned lane) { whole |= (Mask)(copy.bytes[lane] == size) << lane; });
    uint8_t *to[LANES], *from[LANES];
    // The async proxy sees these bytes without a fence: wgmma reads what cp.async wrote after a wait and a barrier.
    const Actor actor{&warp, &i, -1, copy.agent.get(), true};
    find_places(memory, actor, due, (Space)i.number[3], copy.to, size, Access::Write, to);
    if (whole) find_places(memory, actor, whole, (Space)i.number[4], copy.from, size, Access::Read, from);
    each_lane(whole, [&](unsigned lane) { memcpy(to[lane], from[lane], size); });
    each_lane(due & ~whole, [&](unsigned lane) {
        const Actor one{&warp, &i, (int)lane, copy.agent.get()};
        unsigned bytes = copy.bytes[lane];
        memset(to[lane], 0, size);
        if (bytes)
            memcpy(to[lane], memory.at(one, (Space)i.number[4], copy.from[lane], bytes, 1, Access::Read), bytes);
    });
    copy.agent->release(copy.done);
}

// slot: destination, source, source size or whether to ignore the source. number: offsets, size, spaces, which of both
enum { Size = 1, Ignore = 2 };

Step copy(Warp& warp, const Instruction& i, Mask active) {
    auto& copies = warp.states.get<Copies>();
    auto made = std::make_shared<Copy>();
    made->issued = &i;
    made->agent = warp.cluster().fork(warp);
    made->lanes = made->left = active;
    const unsigned size = i.number[2];
    const Mask ignored = i.number[5] == Ignore ? warp.predicate(i.slot[2]) : 0;
    memcpy(made->group, copies.committed, sizeof made->group);
    each_lane(active, [&](unsigned lane) {
        made->to[lane] = warp.get(i.slot[0], lane) + i.number[0];
        made->from[lane] = warp.get(i.slot[1], lane) + i.number[1];
        uint32_t bytes = i.number[5] == Size ? warp.values<uint32_t>(i.slot[2])[lane] : ignored >> lane & 1 ? 0 : size;
        if (bytes > size)
            fault({&warp, &i, (int)lane}, format("cp.async of %u bytes from a source of %u", size, bytes));
        if (bytes && made->from[lane] % size)
            fault({&warp, &i, (int)lane}, format("misaligned source of cp.async: %u bytes at 0x%llx", size,
                                                 (unsigned long long)made->from[lane]));
        made->bytes[lane] = bytes;
    });
    copies.issued.push_back(made);
    auto when = warp.launch().schedule.async;
    if (when == Schedule::Early) perform(warp, *made, ALL);
    if (when == Schedule::Shuffled) warp.cluster().defer(warp, i, [&warp, made] { perform(warp, *made, ALL); });
    return Step::Next;                                // Late: when somebody waits for it
}

void cp_async(Decoder& d) {
    d.one_of({"ca", "cg"});
    d.ignore({"L2::64B", "L2::128B", "L2::256B"});
    Space to = d.one_of({"shared", "shared::cta"}, false).empty() ? Space::Generic : Space::Shared;
    Space from = d.one_of({"global"}, false).empty() ? Space::Generic : Space::Global;
    size_t operands = d.operands() - d.has("L2::cache_hint");
    d.out.slot[0] = d.address(d.operand(0), d.out.number[0], to == Space::Generic);
    d.out.slot[1] = d.address(d.operand(1), d.out.number[1]);
    d.out.number[2] = d.integer(2);
    d.out.number[3] = (int64_t)to, d.out.number[4] = (int64_t)from;
    if (d.out.number[2] != 4 && d.out.number[2] != 8 && d.out.number[2] != 16) d.unsupported("4, 8 or 16 bytes");
    if (operands > 3) {
        d.out.number[5] = d.is_predicate(3) ? Ignore : Size;
        d.out.slot[2] = d.read(3, d.out.number[5] == Ignore ? PRED : B32);
    }
    d.out.run = copy;
}

Step commit(Warp& warp, const Instruction&, Mask active) {
    auto& copies = warp.states.get<Copies>();
    each_lane(active, [&](unsigned lane) { copies.committed[lane]++; });
    return Step::Next;
}

void commit_group(Decoder& d) { d.out.run = commit; }

// number: groups that may stay under way; -1: none, and copies without a group have to end too
Step wait(Warp& warp, const Instruction& i, Mask active) {
    auto& copies = warp.states.get<Copies>();
    const int64_t open = i.number[0];
    size_t kept = 0;
    for (auto& copy : copies.issued) {
        Mask due = 0;
        for (unsigned lane = 0; lane < LANES; lane++)
            due |= (Mask)(open < 0 || copy->group[lane] + open < copies.committed[lane]) << lane;
        due &= active & copy->lanes;
        if (due) {
            perform(warp, *copy, due);
            warp.agent.acquire(copy->done);
            copy->lanes &= ~due;
        }
        if (copy->lanes) copies.issued[kept++] = std::move(copy);
    }
    copies.issued.resize(kept);
    return Step::Next;
}

void wait_group(Decoder& d) {
    d.out.number[0] = d.integer(0);
    d.out.run = wait;
}

void wait_all(Decoder& d) {
    d.out.number[0] = -1;
    d.out.run = wait;
}

// Drops copies whose end an mbarrier tells, once this warp knows of it by another way.
void forget(Warp& warp, Copies& copies) {
    auto known = [&](const std::shared_ptr<Copy>& copy) {
        return copy->lanes == copy->handed && !copy->left &&
               warp.agent.clock.of(copy->agent->id) >= copy->done.of(copy->agent->id);
    };
    auto& all = copies.issued;
    all.erase(std::remove_if(all.begin(), all.end(), known), all.end());
}

// slot: address. number: offset, space, whether the barrier's count already has this arrival (.noinc)
Step arrive_after(Warp& warp, const Instruction& i, Mask active) {
    auto& copies = warp.states.get<Copies>();
    forget(warp, copies);
    for (auto& copy : copies.issued) copy->handed |= active;
    std::array<uint64_t, LANES> address;
    each_lane(active, [&](unsigned lane) {
        address[lane] = warp.get(i.slot[0], lane) + i.number[0];
        if (i.number[2]) return;
        Actor actor{&warp, &i, (int)lane};
        mbarrier_at(actor, (Space)i.number[1], address[lane]).pending++;
    });
    auto agent = warp.cluster().fork(warp);
    warp.cluster().defer(warp, i, [&warp, &i, active, address, agent, prior = copies.issued] {
        for (auto& copy : prior) {
            perform(warp, *copy, active);
            agent->acquire(copy->done);
        }
        each_lane(active, [&](unsigned lane) {
            Actor actor{&warp, &i, (int)lane, agent.get()};
            arrive(actor, mbarrier_at(actor, (Space)i.number[1], address[lane]), 1, agent.get());
        });
    });
    return Step::Next;
}

void mbarrier_arrive(Decoder& d) {
    d.ignore({"b64"});
    Space space = d.one_of({"shared", "shared::cta"}, false).empty() ? Space::Generic : Space::Shared;
    d.out.slot[0] = d.address(d.operand(0), d.out.number[0], space == Space::Generic);
    d.out.number[1] = (int64_t)space;
    d.out.number[2] = d.has("noinc");
    d.out.run = arrive_after;
}

void find_leftovers(Cluster& cluster) {
    for (auto& block : cluster.blocks)
        for (auto& warp : block->warps)
            if (auto* copies = warp->states.find<Copies>())
                for (auto& copy : copies->issued)
                    if (Mask lanes = copy->lanes & ~copy->handed)
                        throw Fault(format("left over at exit: a cp.async that lanes 0x%08x have not waited for",
                                           lanes) + warp->place(*copy->issued));
}

const LeftoverCheck leftovers(find_leftovers);

}  // namespace

Table copy_instructions() {
    return {
        {"cp.async", "9.7.9.25.3.1", cp_async},
        {"cp.async.commit_group", "9.7.9.25.3.2", commit_group},
        {"cp.async.wait_group", "9.7.9.25.3.3", wait_group},
        {"cp.async.wait_all", "9.7.9.25.3.3", wait_all},
        {"cp.async.mbarrier.arrive", "9.7.13.15.15", mbarrier_arrive},
    };
}

}  // namespace ptx
