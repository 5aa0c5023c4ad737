// Bulk copies and reductions, and single asynchronous stores. PTX ISA 9.7.9.12 and 9.7.9.25.4.
#include <cstring>

#include "bulk.h"
#include "decoder.h"
#include "mbarrier.h"

namespace ptx {

namespace {

struct BulkGroups {                  // of a thread
    std::vector<Bulk> open;
    std::deque<std::vector<Bulk>> committed;
};
struct WarpGroups {
    std::array<BulkGroups, LANES> of;
};

}  // namespace

Bulk open_bulk(Warp& warp, const Instruction& i, unsigned lane) {
    auto made = std::make_shared<BulkOperation>();
    made->issued = &i;
    warp.states.get<WarpGroups>().of[lane].open.push_back(made);
    return made;
}

void complete(const Actor& actor, uint64_t mbarrier, unsigned bytes, Agent& agent) {
    Actor signalling = actor;
    signalling.async_proxy = false;
    complete_bytes(signalling, mbarrier_at(signalling, Space::Shared, mbarrier), bytes, &agent);
}

namespace {

Step commit(Warp& warp, const Instruction&, Mask active) {
    auto& groups = warp.states.get<WarpGroups>();
    each_lane(active, [&](unsigned lane) {
        auto& mine = groups.of[lane];
        mine.committed.push_back(std::move(mine.open));
        mine.open.clear();
    });
    return Step::Next;
}

void commit_group(Decoder& d) { d.out.run = commit; }

// number: groups that may stay under way, whether reading the sources is enough
Step wait(Warp& warp, const Instruction& i, Mask active) {
    auto& groups = warp.states.get<WarpGroups>();
    const bool reading = i.number[1];
    auto each_due = [&](auto f) {
        each_lane(active, [&](unsigned lane) {
            auto& committed = groups.of[lane].committed;
            for (int64_t k = 0; k + i.number[0] < (int64_t)committed.size(); k++)
                for (auto& one : committed[k]) f(*one, lane);
        });
    };
    unsigned open = 0;
    each_due([&](const BulkOperation& one, unsigned) { open += !(reading ? one.read : one.done); });
    if (open) return warp.wait([&] { return format("waits for %u bulk copies", open); });
    each_due([&](BulkOperation& one, unsigned) {
        warp.agent.acquire(reading ? one.after_read : one.after);
        one.known = true;
    });
    if (!reading)
        each_lane(active, [&](unsigned lane) {
            auto& committed = groups.of[lane].committed;
            while ((int64_t)committed.size() > i.number[0]) committed.pop_front();
        });
    return Step::Next;
}

void wait_group(Decoder& d) {
    d.out.number[0] = d.integer(0);
    d.out.number[1] = d.has("read");
    d.out.run = wait;
}

// One bulk operation of one thread.
struct Transfer {
    Actor actor;
    std::shared_ptr<Agent> agent;
    uint64_t to, from, mbarrier;
    unsigned bytes;
    Mask blocks;                     // of a multicast; 0: none
    Combine combine;                 // nullptr: a copy
    uint16_t byte_mask;              // of each 16 bytes, those that are written
    Bulk group;

    void write(uint8_t* place, const uint8_t* source) const {
        if (combine) combine(place, source, bytes);
        else if (byte_mask == 0xFFFF) memcpy(place, source, bytes);
        else
            for (unsigned k = 0; k < bytes; k++)
                if (byte_mask >> k % 16 & 1) place[k] = source[k];
    }
};

constexpr unsigned ALIGNMENT = 16;

void to_shared(const Transfer& t, Space from_space) {
    Memory& memory = t.actor.warp->launch().memory;
    const uint8_t* source = nullptr;
    if (t.bytes) source = memory.at(t.actor, from_space, t.from, t.bytes, ALIGNMENT, Access::Read);
    auto deliver = [&](uint64_t to, uint64_t mbarrier) {
        if (&block_of(t.actor, to) != &block_of(t.actor, mbarrier))
            fault(t.actor, "the mbarrier of a bulk copy lies in another block than its destination");
        if (t.bytes) t.write(memory.at(t.actor, Space::Shared, to, t.bytes, ALIGNMENT,
                                       t.combine ? Access::Atomic : Access::Write), source);
        complete(t.actor, mbarrier, t.bytes, *t.agent);
    };
    if (!t.blocks) return deliver(t.to, t.mbarrier);
    for (Mask left = t.blocks; left; left &= left - 1) {
        uint64_t window = (uint64_t)(__builtin_ctz(left) + 1) << RANK_SHIFT;
        deliver(window | shared_offset(t.to), window | shared_offset(t.mbarrier));
    }
}

void to_global(Warp& warp, const Instruction& i, const Transfer& t) {
    warp.cluster().defer(warp, i, [&warp, &i, t] {
        Memory& memory = warp.launch().memory;
        std::vector<uint8_t> held(t.bytes);
        if (t.bytes)
            memcpy(held.data(), memory.at(t.actor, Space::Shared, t.from, t.bytes, ALIGNMENT, Access::Read), t.bytes);
        t.group->read = true;
        t.agent->release(t.group->after_read);
        warp.cluster().defer(warp, i, [t, held] {
            if (t.bytes)
                t.write(t.actor.warp->launch().memory.at(t.actor, Space::Global, t.to, t.bytes, ALIGNMENT,
                                                         t.combine ? Access::Atomic : Access::Write), held.data());
            t.group->done = true;
            t.agent->release(t.group->after);
        });
    });
}

// slot: destination, source, size, mbarrier, mask of blocks or bytes
// number: offsets of destination, source and mbarrier, Kind, reduction, element
enum Kind { GlobalToShared, SharedToShared, SharedToGlobal };
enum { OnlyBytes = 16 };             // a flag of number[3]: the mask is one of bytes

Step issue(Warp& warp, const Instruction& i, Mask active) {
    const int64_t kind = i.number[3] & ~OnlyBytes;
    for (; active; active &= active - 1) {
        unsigned lane = __builtin_ctz(active);
        auto agent = warp.cluster().fork(warp);
        Transfer t{{&warp, &i, (int)lane, agent.get(), true}, agent, 0, 0, 0, 0, 0, nullptr, 0xFFFF, nullptr};
        t.to = warp.get(i.slot[0], lane) + i.number[0], t.from = warp.get(i.slot[1], lane) + i.number[1];
        t.bytes = warp.get(i.slot[2], lane);
        if (i.slot[3]) t.mbarrier = warp.get(i.slot[3], lane) + i.number[2];
        if (i.slot[4] && i.number[3] & OnlyBytes) t.byte_mask = warp.get(i.slot[4], lane);
        else if (i.slot[4]) t.blocks = warp.get(i.slot[4], lane);
        t.combine = combiner((Reduce)i.number[4], (Element)i.number[5]);
        if (t.bytes % ALIGNMENT)
            fault(t.actor, format("a bulk copy of %u bytes: the size must be a multiple of 16", t.bytes));
        if (i.slot[4] && !(i.number[3] & OnlyBytes) && !t.blocks) fault(t.actor, "a multicast to no block");
        if (kind == SharedToGlobal) {
            t.group = open_bulk(warp, i, lane);
            to_global(warp, i, t);
            continue;
        }
        Space from = kind == GlobalToShared ? Space::Global : Space::Shared;
        warp.cluster().defer(warp, i, [t, from] { to_shared(t, from); });
    }
    return Step::Next;
}

void operands(Decoder& d) {
    std::string to = d.next(), from = d.next();
    bool shared = to == "shared::cluster" || to == "shared::cta", own = from == "shared::cta";
    if ((!shared && to != "global") || (!own && from != "global") || (!shared && !own))
        d.unsupported("no such direction");
    d.out.number[3] = !shared ? SharedToGlobal : own ? SharedToShared : GlobalToShared;
    d.one_of({shared ? "mbarrier::complete_tx::bytes" : "bulk_group"});
    d.out.slot[0] = d.address(d.operand(0), d.out.number[0], !shared);
    d.out.slot[1] = d.address(d.operand(1), d.out.number[1], !own);
    d.out.slot[2] = d.read(2, B32);
    if (shared) d.out.slot[3] = d.address(d.operand(3), d.out.number[2], false);
    d.ignore({"L2::cache_hint"});
    d.out.run = issue;
}

void copy(Decoder& d) {
    operands(d);
    if (d.has("multicast::cluster")) d.out.slot[4] = d.read(4, B16);
    if (d.has("cp_mask")) d.out.slot[4] = d.read(d.operands() - 1, B16), d.out.number[3] |= OnlyBytes;
}

void reduce(Decoder& d) {
    operands(d);
    d.ignore({"noftz"});
    d.out.number[4] = (int64_t)reduction_named(d.one_of({"add", "min", "max", "inc", "dec", "and", "or", "xor"}));
    d.out.number[5] = (int64_t)element_named(d.next());
    if (!combiner((Reduce)d.out.number[4], (Element)d.out.number[5])) d.unsupported("no such type for this operation");
}

Step nothing(Warp&, const Instruction&, Mask) { return Step::Next; }

void prefetch(Decoder& d) {
    d.ignore({"L2", "global", "L2::cache_hint"});
    d.out.run = nothing;
}

// Stores of single values that tell an mbarrier. slot: address, mbarrier. number: offsets, bytes, reduction, element
Step store(Warp& warp, const Instruction& i, Mask active) {
    const unsigned each = i.number[2], bytes = each * i.list[0].size();
    for (; active; active &= active - 1) {
        unsigned lane = __builtin_ctz(active);
        auto agent = warp.cluster().fork(warp);
        Actor actor{&warp, &i, (int)lane, agent.get()};
        uint64_t to = warp.get(i.slot[0], lane) + i.number[0], mbarrier = warp.get(i.slot[1], lane) + i.number[1];
        std::array<uint64_t, 4> values{};
        for (size_t k = 0; k < i.list[0].size(); k++) values[k] = warp.get(i.list[0][k], lane);
        warp.cluster().defer(warp, i, [=, &i] {
            if (&block_of(actor, to) != &block_of(actor, mbarrier))
                fault(actor, "the mbarrier of an asynchronous store lies in another block than its destination");
            Combine combine = combiner((Reduce)i.number[3], (Element)i.number[4]);
            uint8_t* place = actor.warp->launch().memory.at(actor, Space::Shared, to, bytes, bytes,
                                                            combine ? Access::Atomic : Access::Write);
            for (size_t k = 0; k < i.list[0].size(); k++) {
                const uint8_t* value = (const uint8_t*)&values[k];
                if (combine) combine(place, value, each);
                else memcpy(place + k * each, value, each);
            }
            complete(actor, mbarrier, bytes, *agent);
        });
    }
    return Step::Next;
}

void store_operands(Decoder& d, Type type) {
    d.one_of({"mbarrier::complete_tx::bytes"});
    d.ignore({"shared::cluster", "weak", "relaxed", "cluster", "v2", "v4"});
    d.out.slot[0] = d.address(d.operand(0), d.out.number[0], false);
    d.out.list[0] = d.read_list(1, type);
    d.out.slot[1] = d.address(d.operand(2), d.out.number[1], false);
    d.out.number[2] = type.bytes;
    if (type.bytes != 4 && type.bytes != 8) d.unsupported("4 or 8 bytes");
    d.out.run = store;
}

void st_async(Decoder& d) { store_operands(d, d.type()); }

void red_async(Decoder& d) {
    d.out.number[3] = (int64_t)reduction_named(d.one_of({"add", "min", "max", "inc", "dec", "and", "or", "xor"}));
    Type type = d.type();
    bool wide = type.bytes == 8, with_sign = type.kind == Type::Signed;
    d.out.number[4] = (int64_t)(with_sign ? wide ? Element::S64 : Element::S32 : wide ? Element::U64 : Element::U32);
    if (!type.is_integer()) d.unsupported("an integer type was expected");
    store_operands(d, type);
}

Step clear(Warp& warp, const Instruction& i, Mask active) {
    each_lane(active, [&](unsigned lane) {
        Actor actor{&warp, &i, (int)lane};
        uint64_t bytes = warp.get(i.slot[1], lane), value = warp.get(i.slot[2], lane);
        if (bytes % 8) fault(actor, format("st.bulk of %llu bytes: not a multiple of 8", (unsigned long long)bytes));
        if (value) fault(actor, "st.bulk of another value than 0");
        if (!bytes) return;
        uint64_t to = warp.get(i.slot[0], lane) + i.number[0];
        memset(warp.launch().memory.at(actor, (Space)i.number[1], to, bytes, 8, Access::Write), 0, bytes);
    });
    return Step::Next;
}

void st_bulk(Decoder& d) {
    d.ignore({"weak"});
    bool shared = d.has("shared::cta");
    d.out.number[1] = (int64_t)(shared ? Space::Shared : Space::Generic);
    d.out.slot[0] = d.address(d.operand(0), d.out.number[0], !shared);
    d.out.slot[1] = d.read(1, d.is_wide(1) ? B64 : B32);
    d.out.slot[2] = d.read(2, B64);
    d.out.run = clear;
}

void find_leftovers(Cluster& cluster) {
    for (auto& block : cluster.blocks)
        for (auto& warp : block->warps)
            if (auto* groups = warp->states.find<WarpGroups>())
                for (auto& [open, committed] : groups->of) {
                    if (!open.empty())
                        throw Fault("left over at exit: a bulk copy that was never committed to a group" +
                                    warp->place(*open[0]->issued));
                    for (auto& group : committed)
                        for (auto& one : group)
                            if (!one->known)
                                throw Fault("left over at exit: a bulk copy that its thread has not waited for" +
                                            warp->place(*one->issued));
                }
}

const LeftoverCheck leftovers(find_leftovers);

}  // namespace

Table bulk_instructions() {
    return {
        {"cp.async.bulk", "9.7.9.25.4.1", copy},
        {"cp.reduce.async.bulk", "9.7.9.25.4.2", reduce},
        {"cp.async.bulk.prefetch", "9.7.9.25.4.3", prefetch},
        {"cp.async.bulk.commit_group", "9.7.9.25.6.1", commit_group},
        {"cp.async.bulk.wait_group", "9.7.9.25.6.2", wait_group},
        {"st.async", "9.7.9.12", st_async},
        {"red.async", "9.7.13.8", red_async},
        {"st.bulk", "9.7.9.13", st_bulk},
    };
}

}  // namespace ptx
