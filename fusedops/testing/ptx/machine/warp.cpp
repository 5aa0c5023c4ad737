// How a warp runs: lanes that stand at the same instruction run it together; the group that is furthest behind goes
// first, so lanes that parted meet again as soon as the code lets them.
#include "warp.h"

#include <cstring>

#include "launch.h"

namespace ptx {

Warp::Warp(Block& block, const Code& code, unsigned index, Mask existing)
    : block(block), code(code), index(index), existing(existing), alive(existing) {
    storage_ = std::make_unique<uint8_t[]>(code.register_bytes + 64);
    registers_ = (uint8_t*)(((uintptr_t)storage_.get() + 63) / 64 * 64);
    memset(registers_, 0xFF, code.register_bytes);    // what was never written reads as NaN
    groups.push_back(Group{});
    groups[0].mask = existing;
    random_ = block.cluster.draw() | 1;
    preset();
}

Launch& Warp::launch() const { return block.cluster.launch; }
Cluster& Warp::cluster() const { return block.cluster; }

void Warp::preset() {
    for (auto& one : code.presets) {
        if (one.slot.bytes == 0) {
            mask_of(one.slot) = one.bits;
            continue;
        }
        for (unsigned lane = 0; lane < LANES; lane++)
            set(one.slot, lane, one.special.empty() ? one.bits : special(one.special, lane));
    }
}

uint64_t Warp::special(const std::string& name, unsigned lane) const {
    const Launch& launch = this->launch();
    unsigned thread = index * LANES + lane;
    Dim size = launch.block, grid = launch.grid, cluster = launch.cluster, block_index = block.index;
    Dim in_block{thread % size.x, thread / size.x % size.y, thread / (size.x * size.y)};
    Dim in_cluster{block_index.x % cluster.x, block_index.y % cluster.y, block_index.z % cluster.z};
    Dim of_cluster{block_index.x / cluster.x, block_index.y / cluster.y, block_index.z / cluster.z};
    Dim clusters{grid.x / cluster.x, grid.y / cluster.y, grid.z / cluster.z};
    auto axis = [&](const Dim& dim) -> uint64_t {
        char last = name.back();
        return last == 'x' ? dim.x : last == 'y' ? dim.y : dim.z;
    };
    size_t dot = name.find('.');
    std::string base = name.substr(0, dot);
    if (dot != std::string::npos) {
        if (base == "%tid") return axis(in_block);
        if (base == "%ntid") return axis(size);
        if (base == "%ctaid") return axis(block_index);
        if (base == "%nctaid") return axis(grid);
        if (base == "%cluster_ctaid") return axis(in_cluster);
        if (base == "%cluster_nctaid") return axis(cluster);
        if (base == "%clusterid") return axis(of_cluster);
        if (base == "%nclusterid") return axis(clusters);
    }
    if (name == "WARP_SZ") return LANES;
    if (name == "%laneid") return lane;
    if (name == "%warpid") return index;
    if (name == "%nwarpid") return block.warps.size();
    if (name == "%lanemask_eq") return 1u << lane;
    if (name == "%lanemask_lt") return (1u << lane) - 1;
    if (name == "%lanemask_le") return (2u << lane) - 1;
    if (name == "%lanemask_gt") return ~((2u << lane) - 1);
    if (name == "%lanemask_ge") return ~((1u << lane) - 1);
    if (name == "%cluster_ctarank") return block.rank;
    if (name == "%cluster_nctarank") return cluster.volume();
    if (name == "%is_explicit_cluster") return cluster.volume() > 1;
    if (name == "%smid" || name == "%gridid") return 0;
    if (name == "%nsmid") return 1;
    if (name == "%dynamic_smem_size") return launch.dynamic_shared;
    if (name == "%total_smem_size") return block.shared.bytes.size();
    throw Fault("special register " + name + " is not supported");
}

uint64_t Warp::get(const Slot& slot, unsigned lane) {
    switch (slot.bytes) {
    case 0: return predicate(slot) >> lane & 1;
    case 2: return values<uint16_t>(slot)[lane];
    case 4: return values<uint32_t>(slot)[lane];
    default: return values<uint64_t>(slot)[lane * (slot.bytes / 8)];
    }
}

void Warp::set(const Slot& slot, unsigned lane, uint64_t bits) {
    switch (slot.bytes) {
    case 0: set_predicate(slot, bits ? ALL : 0, 1u << lane); break;
    case 2: values<uint16_t>(slot)[lane] = bits; break;
    case 4: values<uint32_t>(slot)[lane] = bits; break;
    default: values<uint64_t>(slot)[lane * (slot.bytes / 8)] = bits;
    }
}

Step Warp::execute(const Instruction& instruction) {
    Mask active = group->mask;
    if (instruction.guard) active &= predicate(instruction.guard);
    return active ? instruction.run(*this, instruction, active) : Step::Next;
}

bool Warp::run(unsigned quantum) {
    bool moved = false;
    for (Group& one : groups) one.blocked = false;
    while (quantum && alive && (group = choose())) {
        switch (execute(code.instructions[group->pc])) {
        case Step::Wait: group->blocked = true; continue;
        case Step::Next: group->pc++; break;
        case Step::Yield: group->pc++, quantum = 1; break;
        case Step::Jump: break;
        }
        if (groups.size() > 1) merge();
        moved = true;
        quantum--;
        if (++launch().steps > launch().max_steps)
            throw Fault(format("no end after %llu instructions: a loop that waits for what never comes?",
                               (unsigned long long)launch().max_steps));
    }
    return moved;
}

Group* Warp::choose() {
    if (groups.size() == 1) return groups[0].blocked ? nullptr : &groups[0];
    Group* best = nullptr;
    bool any = launch().schedule.order == Schedule::Random && (random_ = random_ * 6364136223846793005u + 1) >> 62 == 0;
    for (Group& one : groups)
        if (!one.blocked && (!best || (any ? (random_ = random_ * 6364136223846793005u + 1) >> 63 : one.pc < best->pc)))
            best = &one;
    return best;
}

void Warp::merge() {
    for (size_t i = 0; i < groups.size(); i++)
        for (size_t k = i + 1; k < groups.size();) {
            Group &a = groups[i], &b = groups[k];
            if (a.pc != b.pc || a.arrived || b.arrived) {
                k++;
                continue;
            }
            a.mask |= b.mask;
            a.blocked = false;
            groups.erase(groups.begin() + k);
        }
}

Step Warp::jump(Mask taken, uint32_t target) {
    if (taken == group->mask) {
        group->pc = target;
        return Step::Jump;
    }
    Group parted;
    parted.pc = target;
    parted.mask = taken;
    group->mask &= ~taken;
    group->pc++;
    groups.push_back(parted);                         // `group` is chosen anew before the next instruction
    return Step::Jump;
}

Step Warp::exit(Mask lanes) {
    alive &= ~lanes;
    group->mask &= ~lanes;
    group->pc++;
    if (group->mask == 0) groups.erase(groups.begin() + (group - groups.data()));
    return Step::Jump;
}

Step Warp::wait_for_lanes(const Instruction& instruction, Mask wanted, Mask active) {
    return wait([&] {
        return format("%s for lanes 0x%08x: only 0x%08x are here", instruction.statement->full_name().c_str(),
                      wanted, active);
    });
}

Step Warp::aligned(const Instruction& instruction, Mask active) {
    if (alive != ALL)
        throw Fault(format("%s needs all 32 lanes of the warp, 0x%08x have exited or do not exist",
                           instruction.statement->full_name().c_str(), ~alive));
    if (active == ALL) return Step::Next;
    if (instruction.guard && group->mask == ALL)
        throw Fault(format("divergence: %s needs all 32 lanes of the warp, its guard holds in 0x%08x",
                           instruction.statement->full_name().c_str(), active));
    return wait_for_lanes(instruction, ALL, active);
}

std::string Warp::place(const Instruction& instruction) const {
    const Statement& at = *instruction.statement;
    auto file = code.module->files.find(at.source.file);
    bool known = file != code.module->files.end();
    std::string source = known ? format(", %s:%d", file->second.c_str(), at.source.file_line) : "";
    std::string name = code.kernel->name;
    if (name.size() > 80) name = name.substr(0, 77) + "...";      // C++ templates
    return format("\n  in %s, block (%u,%u,%u) warp %u, PTX line %d%s: %s", name.c_str(), block.index.x, block.index.y,
                  block.index.z, index, at.source.line, source.c_str(), at.text.c_str());
}

std::string Warp::describe_waiting() const {
    std::string text;
    for (const Group& one : groups) {
        const Statement& at = *code.instructions[one.pc].statement;
        text += format("\n  block (%u,%u,%u) warp %u lanes 0x%08x, PTX line %d: %s", block.index.x, block.index.y,
                       block.index.z, index, one.mask, at.source.line, one.waiting.c_str());
    }
    return text;
}

}  // namespace ptx
