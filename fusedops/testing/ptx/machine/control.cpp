// Control flow, and what a kernel says to the outside. PTX ISA 9.7.12 and 9.7.19.
#include "launch.h"
#include "pick.h"

namespace ptx {

namespace {

Step branch(Warp& warp, const Instruction& i, Mask active) { return warp.jump(active, i.target); }
Step leave(Warp& warp, const Instruction&, Mask active) { return warp.exit(active); }
Step nothing(Warp&, const Instruction&, Mask) { return Step::Next; }
Step give_way(Warp&, const Instruction&, Mask) { return Step::Yield; }

void bra(Decoder& d) {
    d.ignore({"uni"});                                // a promise of the compiler; lanes that part are followed anyway
    d.out.target = d.label(d.operand(0).name);
    d.out.run = branch;
}

Step branch_by_index(Warp& warp, const Instruction& i, Mask active) {
    const uint32_t* index = warp.values<uint32_t>(i.slot[0]);
    each_lane(active, [&](unsigned lane) {
        if (index[lane] >= i.targets.size())
            fault({&warp, &i, (int)lane}, format("index %u, there are %zu targets", index[lane], i.targets.size()));
    });
    size_t at = warp.group - warp.groups.data();      // the groups may move when one is added
    bool all = active == warp.group->mask;
    while (active) {
        uint32_t which = index[__builtin_ctz(active)];
        Mask same = 0;
        each_lane(active, [&](unsigned lane) { same |= (Mask)(index[lane] == which) << lane; });
        active &= ~same;
        if (all && active == 0) {
            warp.groups[at].pc = i.targets[which];
            break;
        }
        Group parted;
        parted.pc = i.targets[which];
        parted.mask = same;
        warp.groups[at].mask &= ~same;
        warp.groups.push_back(parted);
    }
    if (!all) warp.groups[at].pc++;
    warp.group = &warp.groups[at];
    return Step::Jump;
}

void brx(Decoder& d) {
    d.one_of({"idx"});
    d.ignore({"uni"});
    d.out.slot[0] = d.read(0, U32);
    for (auto& name : d.branch_targets(d.operand(1).name)) d.out.targets.push_back(d.label(name));
    d.out.run = branch_by_index;
}

void ret(Decoder& d) {
    d.ignore({"uni"});
    d.out.run = leave;
}

Step stop(Warp& warp, const Instruction& i, Mask active) {
    fault({&warp, &i, __builtin_ctz(active)}, "the kernel stops itself");
}
void trap(Decoder& d) { d.out.run = stop; }

void nanosleep(Decoder& d) {                          // who waits for another warp lets it run
    d.type();
    d.out.slot[0] = d.read(0, U32);
    d.out.run = give_way;
}

void pmevent(Decoder& d) {
    d.ignore({"mask"});
    d.integer(0);
    d.out.run = nothing;
}

}  // namespace

Table control_instructions() {
    return {
        {"bra", "9.7.12.3", bra},
        {"brx", "9.7.12.4", brx},
        {"ret", "9.7.12.6", ret},
        {"exit", "9.7.12.7", ret},
        {"nanosleep", "9.7.19.1", nanosleep},
        {"pmevent", "9.7.19.2", pmevent},
        {"brkpt", "9.7.19.3", trap},
        {"trap", "9.7.19.4", trap},
    };
}

}  // namespace ptx
