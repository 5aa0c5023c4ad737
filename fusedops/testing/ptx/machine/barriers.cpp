// Barriers of a block and of a warp. PTX ISA 9.7.13.1 and 9.7.13.2.
#include "decoder.h"
#include "launch.h"

namespace ptx {

namespace {

constexpr unsigned BARRIERS = 16;

struct Phase {
    Clock clock;                     // of what arrived
    uint32_t yes = 0, asked = 0;     // threads of .red whose predicate holds, and all of them
    unsigned waiting = 0;            // groups that have yet to leave
};

struct Barrier {
    uint64_t phase = 0;
    uint32_t threads = 0;            // expected in this phase; 0: nobody has arrived
    uint32_t arrived = 0;
    bool everyone = false;           // no number was given: all threads of the block that have not exited
    std::vector<Mask> here;          // who has arrived, by warp
    Phase current;
    std::vector<std::pair<uint64_t, Phase>> done;    // phases that somebody has yet to leave
};

struct Barriers {
    std::array<Barrier, BARRIERS> numbered;
};

enum Reduction { None, And, Or, Count };

// slot: d, barrier, threads, predicate. number: aligned, waits, Reduction
struct Form {
    bool aligned, waits;
    Reduction reduction;
    explicit Form(const Instruction& i) : aligned(i.number[0]), waits(i.number[1]), reduction((Reduction)i.number[2]) {}
};

uint32_t uniform(Warp& warp, const Instruction& i, const Slot& slot, Mask active, const char* what) {
    const uint32_t* value = warp.values<uint32_t>(slot);
    uint32_t first = value[__builtin_ctz(active)];
    each_lane(active, [&](unsigned lane) {
        if (value[lane] != first)
            throw Fault(format("%s: the %s differs between lanes: %u and %u (lane %u)",
                               i.statement->full_name().c_str(), what, first, value[lane], lane));
    });
    return first;
}

// Every lane of the warp that has not exited; ".aligned" is a promise that they come together.
Step whole_warp(Warp& warp, const Instruction& i, Mask active) {
    if (active == warp.alive) return Step::Next;
    if (Mask skipped = warp.group->mask & ~active)
        throw Fault(format("divergence: %s is for all lanes of the warp, its guard does not hold in lanes 0x%08x",
                           i.statement->full_name().c_str(), skipped));
    return warp.wait_for_lanes(i, warp.alive, active);
}

std::string describe(const Block& block, const Barrier& barrier, unsigned number) {
    std::string warps, missing;
    for (auto& warp : block.warps) {
        Mask here = warp->index < barrier.here.size() ? barrier.here[warp->index] : 0;
        if (here) warps += " " + std::to_string(warp->index);
        else if (!warp->done()) missing += " " + std::to_string(warp->index);
    }
    return format("barrier %u: %u of %u threads have arrived, those of warps%s%s%s", number, barrier.arrived,
                  barrier.threads, warps.c_str(), missing.empty() ? "" : "; not those of warps", missing.c_str());
}

bool complete(const Block& block, const Barrier& barrier) {
    if (!barrier.everyone) return barrier.arrived == barrier.threads;
    for (auto& warp : block.warps)
        if (warp->alive & ~barrier.here[warp->index]) return false;
    return true;
}

// Starts the next phase if this one has all it waits for.
void settle(const Block& block, Barrier& barrier) {
    if (barrier.threads == 0 || !complete(block, barrier)) return;
    if (barrier.current.waiting) barrier.done.emplace_back(barrier.phase, std::move(barrier.current));
    barrier.current = Phase();
    barrier.phase++;
    barrier.threads = barrier.arrived = 0;
    barrier.everyone = false;
    barrier.here.assign(block.warps.size(), 0);
}

void arrive(Warp& warp, const Instruction& i, Mask active, Barrier& barrier, unsigned number) {
    const Form form(i);
    Block& block = warp.block;
    uint32_t all = block.warps.size() * LANES, expected = all;
    if (i.slot[2]) {
        expected = uniform(warp, i, i.slot[2], active, "number of threads");
        if (expected == 0 || expected % LANES)
            throw Fault(format("barrier %u for %u threads: not a multiple of the warp size", number, expected));
    }
    barrier.here.resize(block.warps.size());
    if (barrier.threads && barrier.threads != expected)
        throw Fault(format("barrier %u is for %u threads here and was for %u before; %s", number, expected,
                           barrier.threads, describe(block, barrier, number).c_str()));
    barrier.threads = expected;
    barrier.everyone |= !i.slot[2];
    barrier.arrived += form.aligned ? LANES : __builtin_popcount(active);
    barrier.here[warp.index] |= active;
    if (!barrier.everyone && barrier.arrived > barrier.threads)
        throw Fault("more arrivals than expected: " + describe(block, barrier, number));
    warp.agent.release(barrier.current.clock);
    if (form.reduction != None) {
        barrier.current.yes += __builtin_popcount(warp.predicate(i.slot[3]) & active);
        barrier.current.asked += __builtin_popcount(active);
    }
}

void leave(Warp& warp, const Instruction& i, Mask active, const Phase& phase) {
    warp.agent.acquire(phase.clock);
    switch (Form(i).reduction) {
    case None: break;
    case And: warp.set_predicate(i.slot[0], phase.yes == phase.asked ? ALL : 0, active); break;
    case Or: warp.set_predicate(i.slot[0], phase.yes ? ALL : 0, active); break;
    case Count: each_lane(active, [&](unsigned lane) { warp.values<uint32_t>(i.slot[0])[lane] = phase.yes; });
    }
}

Step synchronise(Warp& warp, const Instruction& i, Mask active) {
    const Form form(i);
    Group& group = *warp.group;
    if (!group.arrived && form.aligned)
        if (Step step = whole_warp(warp, i, active); step != Step::Next) return step;
    uint32_t number = uniform(warp, i, i.slot[1], active, "barrier");
    if (number >= BARRIERS) throw Fault(format("barrier %u: a block has barriers 0 to 15", number));
    Barrier& barrier = warp.block.states.get<Barriers>().numbered[number];
    if (!group.arrived) {
        arrive(warp, i, active, barrier, number);
        group.ticket = barrier.phase;
        barrier.current.waiting += form.waits;
        group.arrived = form.waits;
    }
    settle(warp.block, barrier);
    if (!form.waits) return Step::Next;
    for (size_t k = 0; k < barrier.done.size(); k++) {
        auto& [phase, what] = barrier.done[k];
        if (phase != group.ticket) continue;
        leave(warp, i, active, what);
        if (--what.waiting == 0) barrier.done.erase(barrier.done.begin() + k);
        group.arrived = false;
        return Step::Next;
    }
    return warp.wait([&] { return describe(warp.block, barrier, number); });
}

void barrier(Decoder& d, bool aligned) {
    std::string kind = d.one_of({"sync", "arrive", "red"});
    d.ignore({"cta"});
    aligned |= d.has("aligned");
    size_t at = 0;                                    // of the operand that names the barrier
    if (kind == "red") {
        std::string op = d.one_of({"and", "or", "popc"});
        d.out.number[2] = op == "and" ? And : op == "or" ? Or : Count;
        d.out.slot[0] = d.write(0, d.type());
        d.out.slot[3] = d.read(d.operands() - 1, PRED);
        at = 1;
    }
    d.out.slot[1] = d.read(at, B32);
    size_t most = at + 2 + (kind == "red");
    if (d.operands() == most) d.out.slot[2] = d.read(at + 1, B32);
    else if (d.operands() != most - 1 || kind == "arrive") d.unsupported("the number of operands");
    d.out.number[0] = aligned;
    d.out.number[1] = kind != "arrive";
    d.out.run = synchronise;
}

void bar(Decoder& d) { barrier(d, true); }
void barrier_cta(Decoder& d) { barrier(d, false); }

// Lanes may come from different places: one meeting for each member mask.
struct Meeting {
    Mask member = 0, here = 0;
    uint64_t number = 0;             // meetings of this mask so far
};
struct Meetings {
    std::vector<Meeting> of;
};

Step meet(Warp& warp, const Instruction& i, Mask active) {
    Mask member = uniform(warp, i, i.slot[0], active, "member mask");
    Group& group = *warp.group;
    if (Mask outside = active & ~member)
        throw Fault(format("bar.warp.sync: lanes 0x%08x run it with a member mask 0x%08x that leaves them out", outside,
                           member));
    auto& all = warp.states.get<Meetings>().of;
    if (!group.arrived && all.empty() && warp.together(member, active)) return Step::Next;
    auto found = std::find_if(all.begin(), all.end(), [&](const Meeting& one) { return one.member == member; });
    if (found == all.end()) found = all.insert(all.end(), Meeting{member, 0, 0});
    if (!group.arrived) {
        found->here |= active;
        group.ticket = found->number;
        group.arrived = true;
    }
    if (group.ticket == found->number && (member & warp.alive & ~found->here) == 0) found->here = 0, found->number++;
    if (group.ticket == found->number)
        return warp.wait_for_lanes(i, member & warp.alive, found->here);
    group.arrived = false;
    return Step::Next;
}

void bar_warp(Decoder& d) {
    d.out.slot[0] = d.read(0, B32);
    d.out.run = meet;
}

}  // namespace

Table barrier_instructions() {
    return {
        {"bar", "9.7.13.1", bar},
        {"barrier", "9.7.13.1", barrier_cta},
        {"bar.warp.sync", "9.7.13.2", bar_warp},
    };
}

}  // namespace ptx
