#include "mbarrier.h"

#include <cstring>
#include <unordered_map>

#include "decoder.h"

namespace ptx {

namespace {

constexpr uint32_t MAX_COUNT = (1 << 20) - 1;

struct MBarriers {                   // of a block, by offset
    std::unordered_map<uint32_t, MBarrier> at;
};
struct Polls {                       // of a cluster
    uint64_t in_vain = 0;            // test_wait that found nothing, one after another
};

// What shared memory holds where a barrier is, so that a write over it is found.
uint64_t pattern(uint32_t offset) { return 0x6D62617272696572ull ^ ((uint64_t)offset << 32); }

uint64_t shared_address(const Actor& actor, Space space, uint64_t address) {
    if (space == Space::Shared) return address;
    if (address >> 56 != SHARED_WINDOW >> 56)
        fault(actor, format("mbarrier at 0x%llx: not an address in shared memory", (unsigned long long)address));
    return address & (SHARED_WINDOW - 1);
}

std::string place(unsigned rank, uint32_t offset) {
    return format("mbarrier at shared offset %u of block %u of the cluster", offset, rank);
}

void complete_if_due(MBarrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    barrier.phase++;
    barrier.pending = barrier.expected;
    barrier.done = std::move(barrier.arriving);
    barrier.arriving = Clock();
    barrier.unseen = barrier.carried;
    barrier.carried = false;
}

void in_range(const Actor& actor, const MBarrier& barrier) {
    if (barrier.bytes > MAX_BYTES || barrier.bytes < -MAX_BYTES)
        fault(actor, format("tx-count of %lld bytes, the limit is %lld: %s", (long long)barrier.bytes,
                            (long long)MAX_BYTES, describe(barrier).c_str()));
}

}  // namespace

std::string describe(const MBarrier& barrier) {
    std::string text = place(barrier.rank, barrier.offset) +
                       format(", phase %llu (parity %u): %u of %u arrivals missing", (unsigned long long)barrier.phase,
                              (unsigned)(barrier.phase & 1), barrier.pending, barrier.expected);
    if (barrier.bytes > 0) text += format(", %lld bytes still expected", (long long)barrier.bytes);
    if (barrier.bytes < 0) text += format(", %lld bytes more than expected", (long long)-barrier.bytes);
    return text;
}

MBarrier& mbarrier_at(const Actor& actor, Space space, uint64_t address) {
    address = shared_address(actor, space, address);
    Block& block = block_of(actor, address);
    uint32_t offset = shared_offset(address);
    auto& all = block.states.get<MBarriers>().at;
    auto found = all.find(offset);
    if (found == all.end())
        fault(actor, place(block.rank, offset) + ": used before mbarrier.init");
    if (!found->second.valid) fault(actor, place(block.rank, offset) + ": used after mbarrier.inval");
    uint64_t holds;
    memcpy(&holds, actor.warp->launch().memory.at(actor, Space::Shared, address, 8, 8, Access::Atomic), 8);
    if (holds != pattern(offset))
        fault(actor, place(block.rank, offset) + format(": data was written over it, it holds 0x%016llx",
                                                        (unsigned long long)holds));
    return found->second;
}

void arrive(const Actor& actor, MBarrier& barrier, uint32_t count, Agent* agent) {
    if (count == 0 || count > MAX_COUNT) fault(actor, format("mbarrier arrival with a count of %u", count));
    if (count > barrier.pending)
        fault(actor, format("more arrivals than expected, %u at once: %s", count, describe(barrier).c_str()));
    if (agent) agent->release(barrier.arriving);
    barrier.pending -= count;
    complete_if_due(barrier);
}

void expect_bytes(const Actor& actor, MBarrier& barrier, int64_t bytes) {
    barrier.bytes += bytes;
    in_range(actor, barrier);
    if (bytes && barrier.bytes == 0) complete_if_due(barrier);
}

void complete_bytes(const Actor& actor, MBarrier& barrier, int64_t bytes, Agent* agent) {
    if (agent) agent->release(barrier.arriving);
    barrier.bytes -= bytes;
    barrier.carried = true;
    in_range(actor, barrier);
    complete_if_due(barrier);
}

namespace {

// The operands that most forms have. slot: d, address, a, b. number: offset, space, flags, constant
enum Flag { Relaxed = 1, Drop = 2, NoComplete = 4, Expect = 8, Parity = 16, Try = 32 };

Space space_of(Decoder& d) {
    return d.one_of({"shared", "shared::cta", "shared::cluster"}, false).empty() ? Space::Generic : Space::Shared;
}

// .release/.acquire or .relaxed, and a scope: one process runs the cluster, so scopes are all alike.
int64_t ordering(Decoder& d) {
    std::string order = d.one_of({"release", "acquire", "relaxed"}, false);
    d.ignore({"cta", "cluster", "b64"});
    return order == "relaxed" ? Relaxed : 0;
}

void address(Decoder& d, size_t operand) {
    d.out.number[1] = (int64_t)space_of(d);
    d.out.slot[1] = d.address(d.operand(operand), d.out.number[0], d.out.number[1] == (int64_t)Space::Generic);
}

uint64_t address(Warp& warp, const Instruction& i, unsigned lane) {
    return warp.get(i.slot[1], lane) + i.number[0];
}

MBarrier& barrier_of(const Actor& actor) {
    const Instruction& i = *actor.instruction;
    return mbarrier_at(actor, (Space)i.number[1], address(*actor.warp, i, actor.lane));
}

Step initialise(Warp& warp, const Instruction& i, Mask active) {
    each_lane(active, [&](unsigned lane) {
        Actor actor{&warp, &i, (int)lane};
        uint64_t at = shared_address(actor, (Space)i.number[1], address(warp, i, lane));
        uint32_t count = warp.get(i.slot[2], lane), offset = shared_offset(at);
        if (count == 0 || count > MAX_COUNT) fault(actor, format("mbarrier.init with a count of %u", count));
        uint8_t* place = warp.launch().memory.at(actor, Space::Shared, at, 8, 8, Access::Write);
        MBarrier& barrier = block_of(actor, at).states.get<MBarriers>().at[offset];
        uint64_t holds, fresh = pattern(offset);
        memcpy(&holds, place, 8);
        if (barrier.valid && holds == fresh && (barrier.pending != barrier.expected || barrier.bytes))
            fault(actor, "mbarrier.init of one that is in use: " + describe(barrier));
        memcpy(place, &fresh, 8);
        barrier = MBarrier();
        barrier.rank = block_of(actor, at).rank, barrier.offset = offset;
        barrier.valid = true;
        barrier.expected = barrier.pending = count;
    });
    return Step::Next;
}

void init(Decoder& d) {
    address(d, 0);
    d.ignore({"b64"});
    d.out.slot[2] = d.read(1, B32);
    d.out.run = initialise;
}

Step invalidate(Warp& warp, const Instruction& i, Mask active) {
    each_lane(active, [&](unsigned lane) {
        Actor actor{&warp, &i, (int)lane};
        MBarrier& barrier = barrier_of(actor);
        uint64_t at = shared_address(actor, (Space)i.number[1], address(warp, i, lane));
        uint8_t* place = warp.launch().memory.at(actor, Space::Shared, at, 8, 8, Access::Write);
        memset(place, 0, 8);
        barrier.valid = false;
    });
    return Step::Next;
}

void inval(Decoder& d) {
    address(d, 0);
    d.ignore({"b64"});
    d.out.run = invalidate;
}

// A state names the phase it was taken in and the arrivals that were missing then.
uint64_t state_of(const MBarrier& barrier) { return (barrier.phase << 32) | barrier.pending; }

Step do_arrive(Warp& warp, const Instruction& i, Mask active) {
    const int64_t flags = i.number[2];
    for (Mask left = active; left; left &= left - 1) {
        unsigned lane = __builtin_ctz(left);
        Actor actor{&warp, &i, (int)lane};
        MBarrier& barrier = barrier_of(actor);
        uint32_t count = 1;
        if (i.slot[2] && !(flags & Expect)) count = warp.get(i.slot[2], lane);
        if (i.slot[0]) warp.set(i.slot[0], lane, state_of(barrier));
        if (flags & Expect) expect_bytes(actor, barrier, (uint32_t)warp.get(i.slot[2], lane));
        if (flags & NoComplete && count >= barrier.pending)
            fault(actor, "an arrival with .noComplete would complete the phase: " + describe(barrier));
        if (flags & Drop) {
            if (count > barrier.expected)
                fault(actor, "mbarrier.arrive_drop of more than there are: " + describe(barrier));
            barrier.expected -= count;
        }
        if (flags & Relaxed) barrier.arriving.join(warp.agent.fenced);
        arrive(actor, barrier, count, flags & Relaxed ? nullptr : &warp.agent);
    }
    return Step::Next;
}

void arrival(Decoder& d, int64_t flags) {
    d.out.number[2] = flags | ordering(d) | (d.has("noComplete") ? NoComplete : 0) | (d.has("expect_tx") ? Expect : 0);
    bool has_state = d.operand(0).kind != Operand::Address;
    if (has_state && d.operand(0).name != "_") d.out.slot[0] = d.write(0, B64);
    address(d, has_state);
    if (d.operands() > has_state + 1u) d.out.slot[2] = d.read(has_state + 1, B32);
    d.out.run = do_arrive;
}
void arrive_plain(Decoder& d) { arrival(d, 0); }
void arrive_drop(Decoder& d) { arrival(d, Drop); }

template <bool expect> Step count_bytes(Warp& warp, const Instruction& i, Mask active) {
    each_lane(active, [&](unsigned lane) {
        Actor actor{&warp, &i, (int)lane};
        int64_t bytes = (uint32_t)warp.get(i.slot[2], lane);
        if (expect) expect_bytes(actor, barrier_of(actor), bytes);
        else complete_bytes(actor, barrier_of(actor), bytes, nullptr);
    });
    return Step::Next;
}

void transaction(Decoder& d, Handler run) {
    ordering(d);
    address(d, 0);
    d.out.slot[2] = d.read(1, B32);
    d.out.run = run;
}
void expect_tx(Decoder& d) { transaction(d, count_bytes<true>); }
void complete_tx(Decoder& d) { transaction(d, count_bytes<false>); }

bool is_complete(const Actor& actor, const MBarrier& barrier) {
    const Instruction& i = *actor.instruction;
    uint64_t token = actor.warp->get(i.slot[2], actor.lane);
    if (i.number[2] & Parity) return (barrier.phase & 1) != (token & 1);
    uint64_t phase = token >> 32, now = barrier.phase & ~0u;
    if (now != phase && now != phase + 1)
        fault(actor, format("the state is of phase %llu, neither this nor the last: %s", (unsigned long long)phase,
                            describe(barrier).c_str()));
    return now != phase;
}

// Polling alone does not let time pass: after some polls in vain an asynchronous operation takes place.
void poll_in_vain(Warp& warp, const MBarrier& barrier) {
    constexpr uint64_t A_WHILE = 256, FOREVER = 1 << 22;
    Cluster& cluster = warp.cluster();
    uint64_t polls = ++cluster.states.get<Polls>().in_vain;
    if (polls % A_WHILE == 0 && cluster.run_pending()) cluster.states.get<Polls>().in_vain = 0;
    if (polls > FOREVER)
        throw Fault(format("DEADLOCK: mbarrier.test_wait polled %llu times in vain: %s", (unsigned long long)polls,
                           describe(barrier).c_str()));
}

// try_wait waits until the phase of some lane is complete; the others find that theirs is not.
Step look(Warp& warp, const Instruction& i, Mask active) {
    const int64_t flags = i.number[2];
    Mask ready = 0;
    uint64_t last = ~0ull;
    MBarrier* barrier = nullptr;
    for (Mask left = active; left; left &= left - 1) {
        unsigned lane = __builtin_ctz(left);
        Actor actor{&warp, &i, (int)lane};
        uint64_t at = address(warp, i, lane);
        bool again = at == last;
        if (!again) barrier = &barrier_of(actor), last = at;
        if (!is_complete(actor, *barrier)) continue;
        ready |= 1u << lane;
        barrier->unseen = false;
        if (!again) (flags & Relaxed ? warp.agent.seen : warp.agent.clock).join(barrier->done);
    }
    Cluster& cluster = warp.cluster();
    if (!ready && flags & Try) return warp.wait([&] {
        unsigned lane = __builtin_ctz(active);
        std::string parity = flags & Parity ? format("parity %u of ", (unsigned)(warp.get(i.slot[2], lane) & 1)) : "";
        return "waits for " + parity + describe(barrier_of({&warp, &i, (int)lane}));
    });
    // The hardware may give up early; who does not ask again goes on too soon.
    if (flags & Try && cluster.launch.schedule.async == Schedule::Shuffled && cluster.draw() % 4 == 0) ready = 0;
    warp.set_predicate(i.slot[0], ready, active);
    if (ready) cluster.states.get<Polls>().in_vain = 0;
    else if (!(flags & Try)) poll_in_vain(warp, *barrier);
    return ready == active ? Step::Next : Step::Yield;
}

void waiting(Decoder& d, int64_t flags) {
    d.out.number[2] = flags | ordering(d) | (d.has("parity") ? Parity : 0);
    d.out.slot[0] = d.write(0, PRED);
    address(d, 1);
    d.out.slot[2] = d.read(2, d.out.number[2] & Parity ? B32 : B64);
    if (d.operands() > 3) d.read(3, B32);             // how long to wait at most: a hint
    d.out.run = look;
}
void test_wait(Decoder& d) { waiting(d, 0); }
void try_wait(Decoder& d) { waiting(d, Try); }

Step missing_arrivals(Warp& warp, const Instruction& i, Mask active) {
    each_lane(active, [&](unsigned lane) { warp.set(i.slot[0], lane, warp.get(i.slot[1], lane) & MAX_COUNT); });
    return Step::Next;
}

void pending_count(Decoder& d) {
    d.ignore({"b64"});
    d.out.slot[0] = d.write(0, B32), d.out.slot[1] = d.read(1, B64);
    d.out.run = missing_arrivals;
}

void find_leftovers(Cluster& cluster) {
    for (auto& block : cluster.blocks)
        if (auto* all = block->states.find<MBarriers>())
            for (auto& [offset, barrier] : all->at) {
                std::string where = describe(barrier) + "\n  in " + cluster.launch.code.kernel->name;
                if (barrier.valid && barrier.bytes) throw Fault("left over at exit: " + where);
                if (barrier.valid && barrier.unseen)
                    throw Fault("left over at exit: bytes came and nobody waited for them: " + where);
            }
}

const LeftoverCheck leftovers(find_leftovers);

}  // namespace

Table mbarrier_instructions() {
    return {
        {"mbarrier.init", "9.7.13.15.9", init},
        {"mbarrier.inval", "9.7.13.15.10", inval},
        {"mbarrier.expect_tx", "9.7.13.15.11", expect_tx},
        {"mbarrier.complete_tx", "9.7.13.15.12", complete_tx},
        {"mbarrier.arrive", "9.7.13.15.13", arrive_plain},
        {"mbarrier.arrive_drop", "9.7.13.15.14", arrive_drop},
        {"mbarrier.test_wait", "9.7.13.15.16", test_wait},
        {"mbarrier.try_wait", "9.7.13.15.16", try_wait},
        {"mbarrier.pending_count", "9.7.13.15.17", pending_count},
    };
}

}  // namespace ptx
