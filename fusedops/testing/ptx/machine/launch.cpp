// The order of everything: clusters one after another, warps in turns, asynchronous operations when they are due.
#include "launch.h"

namespace ptx {

Block::Block(Cluster& cluster, Dim index, unsigned rank) : cluster(cluster), index(index), rank(rank) {
    Launch& launch = cluster.launch;
    unsigned bytes = launch.code.static_shared + launch.dynamic_shared;
    if (bytes > MAX_SHARED) throw Fault(format("%u bytes of shared memory, a block has %u", bytes, MAX_SHARED));
    shared.resize(bytes);
    unsigned count = threads();
    for (unsigned i = 0; i * LANES < count; i++) {
        unsigned lanes = std::min(count - i * LANES, LANES);
        warps.push_back(nullptr);
        warps[i] = std::make_unique<Warp>(*this, launch.code, i, lanes == LANES ? ALL : (1u << lanes) - 1);
    }
}

unsigned Block::threads() const { return cluster.launch.block.volume(); }

bool Block::done() const {
    for (auto& warp : warps)
        if (!warp->done()) return false;
    return true;
}

Cluster::Cluster(Launch& launch, Dim first)
    : launch(launch), first(first),
      random(launch.schedule.seed * 0x9E3779B97F4A7C15ull + first.x + 131 * first.y + 65537 * first.z + 1) {
    Dim size = launch.cluster;
    for (unsigned rank = 0; rank < size.volume(); rank++) {
        Dim index{first.x + rank % size.x, first.y + rank / size.x % size.y, first.z + rank / (size.x * size.y)};
        blocks.push_back(std::make_unique<Block>(*this, index, rank));
        for (auto& warp : blocks.back()->warps) {
            warp->agent.id = warps_++;
            warp->agent.tick();
            agents_.push_back(warp.get());
        }
    }
}

uint64_t Cluster::draw() {                            // xorshift64*
    random ^= random >> 12, random ^= random << 25, random ^= random >> 27;
    return random * 0x2545F4914F6CDD1Dull;
}

void Cluster::defer(Warp& issuer, const Instruction& instruction, std::function<void()> operation) {
    if (launch.schedule.async == Schedule::Early) operation();
    else pending.push_back({std::move(operation), &issuer, &instruction});
}

// The number of an operation that has ended is taken again where the issuer knows of that end: the two then follow one
// another like the instructions of a warp, and clocks stay as short as the operations under way are few.
std::shared_ptr<Agent> Cluster::fork(Warp& issuer) {
    auto made = std::shared_ptr<Agent>(new Agent, [ended = ended_](Agent* agent) {
        // One that never released its last accesses is not known to anyone, and its number not given again.
        if (agent->published && agent->published + 1 == agent->now()) ended->push_back({agent->id, agent->published});
        delete agent;
    });
    issuer.agent.release(made->clock);
    constexpr size_t LOOKED_AT = 32;                  // the oldest are the most likely to be known
    for (size_t i = 0; i < std::min(ended_->size(), LOOKED_AT); i++) {
        Ended one = (*ended_)[i];
        if (issuer.agent.clock.of(one.id) < one.tick) continue;
        made->id = one.id;
        ended_->erase(ended_->begin() + i);
        agents_[made->id] = &issuer;
        made->tick();
        return made;
    }
    made->id = agents_.size();
    agents_.push_back(&issuer);
    made->tick();
    return made;
}

std::string Cluster::describe_agent(unsigned id) const {
    const Warp& warp = *agents_[id];
    const Dim& in = warp.block.index;
    return format("%swarp %u of block (%u,%u,%u)", id < warps_ ? "" : "an asynchronous operation of ", warp.index, in.x,
                  in.y, in.z);
}

bool Cluster::run_pending() {
    if (pending.empty()) return false;
    size_t which = launch.schedule.async == Schedule::Shuffled ? draw() % pending.size() : 0;
    Pending due = std::move(pending[which]);
    pending.erase(pending.begin() + which);
    try {
        due.run();
    } catch (const Fault& error) {
        throw Fault(error.what() + due.issuer->place(*due.instruction));
    }
    return true;
}

bool Cluster::turn() {
    const Schedule& schedule = launch.schedule;
    std::vector<Warp*> order;
    for (auto& block : blocks)
        for (auto& warp : block->warps)
            if (!warp->done()) order.push_back(warp.get());
    if (schedule.order == Schedule::Descending) std::reverse(order.begin(), order.end());
    if (schedule.order == Schedule::Random)
        for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[draw() % i]);
    bool moved = false;
    for (Warp* warp : order) {
        bool far = schedule.order == Schedule::Ascending || schedule.order == Schedule::Descending;
        unsigned quantum = far ? 1u << 30 : schedule.order == Schedule::Random ? 1 + draw() % schedule.quantum
                                                                               : schedule.quantum;
        try {
            moved |= warp->run(quantum);
        } catch (const Fault& error) {
            throw Fault(error.what() + warp->place(warp->code.instructions[warp->group->pc]));
        }
        if (schedule.async == Schedule::Shuffled && draw() % 4 == 0) moved |= run_pending();
    }
    return moved;
}

void Cluster::run() {
    auto done = [&] {
        for (auto& block : blocks)
            if (!block->done()) return false;
        return true;
    };
    while (!done())
        if (!turn() && !run_pending()) deadlock();
    finish();
}

void Cluster::deadlock() {
    explaining = true;
    turn();
    std::string text = format("DEADLOCK in %s: no thread can go on", launch.code.kernel->name.c_str());
    for (auto& block : blocks)
        for (auto& warp : block->warps)
            if (!warp->done()) text += warp->describe_waiting();
    throw Fault(text);
}

namespace {

std::vector<void (*)(Cluster&)>& leftover_checks() {
    static std::vector<void (*)(Cluster&)> all;
    return all;
}

}  // namespace

LeftoverCheck::LeftoverCheck(void (*check)(Cluster&)) { leftover_checks().push_back(check); }

void check_leftovers(Cluster& cluster) {
    try {
        for (auto check : leftover_checks()) check(cluster);
    } catch (const Fault& left) {
        throw Fault(format("%s\n  at the end of %s", left.what(), cluster.launch.code.kernel->name.c_str()));
    }
}

void Cluster::finish() {
    if (launch.checking(Checks::Leftovers)) check_leftovers(*this);
    while (run_pending()) {}
    settle_writes(*this);
}

void Launch::run() {
    Dim of{grid.x / cluster.x, grid.y / cluster.y, grid.z / cluster.z};
    if (of.x * cluster.x != grid.x || of.y * cluster.y != grid.y || of.z * cluster.z != grid.z)
        throw Fault("the grid is not a multiple of the cluster");
    const unsigned* required = code.kernel->required_threads;
    if (required[0] && (required[0] != block.x || required[1] != block.y || required[2] != block.z))
        throw Fault(format("%s must be launched with %ux%ux%u threads, got %ux%ux%u", code.kernel->name.c_str(),
                           required[0], required[1], required[2], block.x, block.y, block.z));
    if (block.volume() == 0 || block.volume() > 1024)
        throw Fault(format("a block has 1 to 1024 threads, got %u", block.volume()));
    uint64_t count = (uint64_t)of.x * of.y * of.z;
    for (uint64_t n = 0; n < count; n++) {
        uint64_t i = schedule.blocks_reversed ? count - 1 - n : n;
        Dim first{(unsigned)(i % of.x) * cluster.x, (unsigned)(i / of.x % of.y) * cluster.y,
                  (unsigned)(i / of.x / of.y) * cluster.z};
        Cluster(*this, first).run();
    }
}

}  // namespace ptx
