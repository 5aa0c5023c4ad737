// Instructions in which the lanes of a warp look at each other. PTX ISA 9.7.9.6 and 9.7.13.
#include "decoder.h"
#include "launch.h"

namespace ptx {

namespace {

uint32_t first_lane(Mask mask) { return __builtin_ctz(mask); }

Mask existing_of(const Warp& warp, Mask member) { return member & warp.alive; }

// Whether the lanes of a member mask stand here, each with the same mask. Next: they do, for every mask among `active`.
// Lanes that exited are not waited for; lanes that stand here with a guard that does not hold will never come.
Step gather(Warp& warp, const Instruction& i, const Slot& members, Mask active) {
    const uint32_t* mask = warp.values<uint32_t>(members);
    const char* name = i.statement->name[0].c_str();
    for (Mask left = active; left;) {
        unsigned lane = first_lane(left);
        Mask member = mask[lane], same = 0;
        each_lane(active, [&](unsigned other) { same |= (Mask)(mask[other] == member) << other; });
        left &= ~same;
        if (Mask outside = same & ~member)
            throw Fault(format("%s: lanes 0x%08x run it with a member mask 0x%08x that leaves them out", name, outside,
                               member));
        if (Mask other = existing_of(warp, member) & active & ~same)
            throw Fault(format("divergence: %s with member mask 0x%08x, but lanes 0x%08x give another mask", name,
                               member, other));
        if (Mask skipped = existing_of(warp, member) & warp.group->mask & ~active)
            throw Fault(format("divergence: %s with member mask 0x%08x, but its guard does not hold in lanes 0x%08x",
                               name, member, skipped));
        if (!warp.together(member, active)) return warp.wait_for_lanes(i, existing_of(warp, member), active);
    }
    return Step::Next;
}

// Calls f(lanes) for the lanes of each member mask.
template <class F> void each_team(Warp& warp, const Slot& members, Mask active, F f) {
    const uint32_t* mask = warp.values<uint32_t>(members);
    while (active) {
        Mask team = mask[first_lane(active)] & active;
        f(team);
        active &= ~team;
    }
}

// d = a of another lane. slot: d, a, b, c, member mask, p
enum Shuffle { Up, Down, Butterfly, Index };

template <Shuffle mode> void source_lanes(const uint32_t* b, const uint32_t* c, uint32_t* source, Mask* valid) {
    Mask in_range = 0;
    for (unsigned lane = 0; lane < LANES; lane++) {
        uint32_t segment = c[lane] >> 8 & 31, clamp = c[lane] & 31, by = b[lane] & 31;
        uint32_t last = (lane & segment) | (clamp & ~segment), first = lane & segment;
        int from = mode == Up ? (int)lane - (int)by : mode == Down ? lane + by
                   : mode == Butterfly ? lane ^ by : first | (by & ~segment);
        bool good = mode == Up ? from >= (int)last : from <= (int)last;
        source[lane] = good ? from & 31 : lane;
        in_range |= (Mask)good << lane;
    }
    *valid = in_range;
}

template <Shuffle mode> Step shuffle(Warp& warp, const Instruction& i, Mask active) {
    if (Step step = gather(warp, i, i.slot[4], active); step != Step::Next) return step;
    uint32_t source[LANES], value[LANES];
    Mask valid;
    source_lanes<mode>(warp.values<uint32_t>(i.slot[2]), warp.values<uint32_t>(i.slot[3]), source, &valid);
    uint32_t* d = warp.values<uint32_t>(i.slot[0]);
    const uint32_t* a = warp.values<uint32_t>(i.slot[1]);
    for (unsigned lane = 0; lane < LANES; lane++) value[lane] = a[source[lane]];
    if (active != ALL)
        each_lane(active, [&](unsigned lane) {
            if (active >> source[lane] & 1) return;
            // What such a lane gives is undefined. Sums over part of a warp read it and throw it away.
            value[lane] = ~0u;
            if (mode == Index)
                fault({&warp, &i, (int)lane},
                      format("shfl reads lane %u, which does not take part (lanes 0x%08x do)", source[lane], active));
        });
    each_lane(active, [&](unsigned lane) { d[lane] = value[lane]; });
    if (i.slot[5]) warp.set_predicate(i.slot[5], valid, active);
    return Step::Next;
}

// d|p or d alone
void destination(Decoder& d, Type type, unsigned predicate_slot) {
    const Operand& to = d.operand(0);
    if (to.kind != Operand::Pair) {
        d.out.slot[0] = d.write(0, type);
        return;
    }
    d.out.slot[0] = d.write(to.parts[0], type);
    d.out.slot[predicate_slot] = d.write(to.parts[1], PRED);
}

void shfl(Decoder& d) {
    std::string mode = d.one_of({"up", "down", "bfly", "idx"});
    d.type();
    destination(d, B32, 5);
    for (unsigned k = 1; k <= 4; k++) d.out.slot[k] = d.read(k, B32);
    d.out.run = mode == "up" ? shuffle<Up> : mode == "down" ? shuffle<Down>
                : mode == "bfly" ? shuffle<Butterfly> : shuffle<Index>;
}

// slot: d, a, member mask. Floats join each value with itself first, so that one lane alone is treated alike.
template <class T, T (*join)(T, T), bool with_itself = false>
Step reduce(Warp& warp, const Instruction& i, Mask active) {
    if (Step step = gather(warp, i, i.slot[2], active); step != Step::Next) return step;
    each_team(warp, i.slot[2], active, [&](Mask team) {
        T *d = warp.values<T>(i.slot[0]), *a = warp.values<T>(i.slot[1]);
        T all = a[first_lane(team)];
        if (with_itself) all = join(all, all);
        each_lane(team & (team - 1), [&](unsigned lane) { all = join(all, a[lane]); });
        each_lane(team, [&](unsigned lane) { d[lane] = all; });
    });
    return Step::Next;
}

template <class T> T plus(T a, T b) { return a + b; }
template <class T> T least(T a, T b) { return std::min(a, b); }
template <class T> T most(T a, T b) { return std::max(a, b); }
uint32_t both(uint32_t a, uint32_t b) { return a & b; }
uint32_t either(uint32_t a, uint32_t b) { return a | b; }
uint32_t odd(uint32_t a, uint32_t b) { return a ^ b; }

constexpr uint32_t SIGN = 1u << 31, INFINITE = 0x7F800000, QUIET = 0x7FFFFFFF;

// Floats by their bits: -0 is less than +0; a NaN loses, or wins with .NaN; the result is then the canonical NaN.
template <bool maximum, bool absolute, bool keep_nan> uint32_t extreme(uint32_t a, uint32_t b) {
    if (absolute) a &= ~SIGN, b &= ~SIGN;
    bool a_nan = (a & ~SIGN) > INFINITE, b_nan = (b & ~SIGN) > INFINITE;
    if (a_nan || b_nan) return keep_nan || (a_nan && b_nan) ? QUIET : a_nan ? b : a;
    auto key = [](uint32_t bits) { return (int32_t)(bits & SIGN ? bits ^ QUIET : bits); };
    return (key(a) < key(b)) == maximum ? b : a;
}

template <bool maximum> Handler float_reduction(bool absolute, bool keep_nan) {
    if (absolute) return keep_nan ? reduce<uint32_t, extreme<maximum, true, true>, true>
                                  : reduce<uint32_t, extreme<maximum, true, false>, true>;
    return keep_nan ? reduce<uint32_t, extreme<maximum, false, true>, true>
                    : reduce<uint32_t, extreme<maximum, false, false>, true>;
}

void redux(Decoder& d) {
    std::string op = d.one_of({"add", "min", "max", "and", "or", "xor"});
    Type type = d.type();
    d.out.slot[0] = d.write(0, type), d.out.slot[1] = d.read(1, type), d.out.slot[2] = d.read(2, B32);
    bool maximum = op == "max", minimum = op == "min", logic = op == "and" || op == "or" || op == "xor";
    if (type.is(Type::Float, 4) && (maximum || minimum)) {
        bool absolute = d.has("abs"), keep_nan = d.has("NaN");
        d.out.run = maximum ? float_reduction<true>(absolute, keep_nan) : float_reduction<false>(absolute, keep_nan);
    } else if (type.bytes != 4 || type.kind == Type::Float || (type.kind == Type::Bits) != logic) {
        d.unsupported("no such type for this operation");
    } else if (logic) {
        d.out.run = op == "and" ? reduce<uint32_t, both> : op == "or" ? reduce<uint32_t, either>
                                                                      : reduce<uint32_t, odd>;
    } else if (type.kind == Type::Signed) {
        d.out.run = maximum ? reduce<int32_t, most<int32_t>> : minimum ? reduce<int32_t, least<int32_t>>
                                                                       : reduce<uint32_t, plus<uint32_t>>;
    } else {
        d.out.run = maximum ? reduce<uint32_t, most<uint32_t>> : minimum ? reduce<uint32_t, least<uint32_t>>
                                                                         : reduce<uint32_t, plus<uint32_t>>;
    }
}

// One lane of the mask, here the lowest: d is its number, p is true there. slot: d, member mask, p
Step choose_leader(Warp& warp, const Instruction& i, Mask active) {
    if (Step step = gather(warp, i, i.slot[1], active); step != Step::Next) return step;
    each_team(warp, i.slot[1], active, [&](Mask team) {
        uint32_t* d = warp.values<uint32_t>(i.slot[0]);
        each_lane(team, [&](unsigned lane) { d[lane] = first_lane(team); });
        warp.set_predicate(i.slot[2], team & -team, team);
    });
    return Step::Next;
}

void elect(Decoder& d) {
    destination(d, B32, 2);
    if (!d.out.slot[2]) d.unsupported("d|p was expected");
    d.out.slot[1] = d.read(1, B32);
    d.out.run = choose_leader;
}

// slot: d, a, member mask
enum Vote { All, Any, Uniform, Ballot };

template <Vote kind> Step ask(Warp& warp, const Instruction& i, Mask active) {
    if (Step step = gather(warp, i, i.slot[2], active); step != Step::Next) return step;
    Mask yes = warp.predicate(i.slot[1]);
    each_team(warp, i.slot[2], active, [&](Mask team) {
        Mask here = yes & team;
        if (kind == Ballot) {
            uint32_t* d = warp.values<uint32_t>(i.slot[0]);
            each_lane(team, [&](unsigned lane) { d[lane] = here; });
        } else {
            bool answer = kind == All ? here == team : kind == Any ? here != 0 : here == team || here == 0;
            warp.set_predicate(i.slot[0], answer ? ALL : 0, team);
        }
    });
    return Step::Next;
}

void vote(Decoder& d) {
    std::string kind = d.one_of({"all", "any", "uni", "ballot"});
    Type type = d.type();
    d.out.slot[0] = d.write(0, type), d.out.slot[1] = d.read(1, PRED), d.out.slot[2] = d.read(2, B32);
    d.out.run = kind == "all" ? ask<All> : kind == "any" ? ask<Any> : kind == "uni" ? ask<Uniform> : ask<Ballot>;
}

// Lanes with the same value. slot: d, a, member mask, p
template <class T, bool all> Step compare(Warp& warp, const Instruction& i, Mask active) {
    if (Step step = gather(warp, i, i.slot[2], active); step != Step::Next) return step;
    each_team(warp, i.slot[2], active, [&](Mask team) {
        const T* a = warp.values<T>(i.slot[1]);
        uint32_t same[LANES], *d = warp.values<uint32_t>(i.slot[0]);
        each_lane(team, [&](unsigned lane) {
            same[lane] = 0;
            each_lane(team, [&](unsigned other) { same[lane] |= (Mask)(a[other] == a[lane]) << other; });
        });
        bool agree = same[first_lane(team)] == team;
        each_lane(team, [&](unsigned lane) { d[lane] = all ? (agree ? team : 0) : same[lane]; });
        if (i.slot[3]) warp.set_predicate(i.slot[3], agree ? ALL : 0, team);
    });
    return Step::Next;
}

template <bool all> void match(Decoder& d) {
    Type type = d.type();
    destination(d, B32, 3);
    if (d.out.slot[3] && !all) d.unsupported("a predicate goes with .all");
    d.out.slot[1] = d.read(1, type), d.out.slot[2] = d.read(2, B32);
    if (type.bytes == 4) d.out.run = all ? compare<uint32_t, true> : compare<uint32_t, false>;
    else if (type.bytes == 8) d.out.run = all ? compare<uint64_t, true> : compare<uint64_t, false>;
    else d.unsupported("a type of 32 or 64 bits was expected");
}

Step active_lanes(Warp& warp, const Instruction& i, Mask active) {
    uint32_t* d = warp.values<uint32_t>(i.slot[0]);
    each_lane(active, [&](unsigned lane) { d[lane] = active; });
    return Step::Next;
}

void activemask(Decoder& d) {
    d.out.slot[0] = d.write(0, d.type());
    d.out.run = active_lanes;
}

}  // namespace

Table warp_instructions() {
    return {
        {"shfl.sync", "9.7.9.6", shfl},
        {"redux.sync", "9.7.13.9", redux},
        {"elect.sync", "9.7.13.14", elect},
        {"vote.sync", "9.7.13.6", vote},
        {"match.any.sync", "9.7.13.7", match<false>},
        {"match.all.sync", "9.7.13.7", match<true>},
        {"activemask", "9.7.13.8", activemask},
    };
}

}  // namespace ptx
