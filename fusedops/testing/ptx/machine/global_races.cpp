#include "global_races.h"

#include "launch.h"

namespace ptx {

namespace {

uint32_t number(const Cluster& cluster) {
    const Dim &size = cluster.launch.cluster, &grid = cluster.launch.grid, &at = cluster.first;
    return at.x / size.x + grid.x / size.x * (at.y / size.y + grid.y / size.y * (at.z / size.z)) + 1;
}

std::string block_named(const Launch& launch, uint32_t number) {
    const Dim &size = launch.cluster, &grid = launch.grid;
    unsigned x = grid.x / size.x, y = grid.y / size.y, n = number - 1;
    return format("%sblock (%u,%u,%u)", size.volume() > 1 ? "the cluster of " : "", n % x * size.x, n / x % y * size.y,
                  n / x / y * size.z);
}

}  // namespace

void GlobalRaces::touch(const Actor& actor, uint64_t begin, uint64_t end, Access access) {
    const Cluster& cluster = actor.warp->cluster();
    if (strong(access)) {                             // orders, or is ordered with, what others do
        if (reads(access)) synchronised_ = &cluster;
        return;
    }
    if (!writes(access) && (pages_.empty() || synchronised_ == &cluster)) return;
    uint32_t me = number(cluster);
    for (uint64_t next; begin < end; begin = next) {
        next = std::min(end, ((begin >> PAGE_LOG2) + 1) << PAGE_LOG2);
        auto found = pages_.find(begin >> PAGE_LOG2);
        if (!writes(access)) {
            if (found != pages_.end()) read(actor, *found->second, begin, next, me);
            continue;
        }
        if (found == pages_.end()) found = pages_.emplace(begin >> PAGE_LOG2, std::make_unique<Page>()).first;
        write(actor, *found->second, begin, next, me, synchronised_ != &cluster);
    }
}

void GlobalRaces::read(const Actor& actor, const Page& page, uint64_t begin, uint64_t end, uint32_t me) {
    const uint32_t* writer = page.writer + (begin & ((1u << PAGE_LOG2) - 1));
    bool foreign = false;
    for (uint64_t i = 0; i < end - begin; i++) foreign |= (writer[i] != 0) & (writer[i] != me);
    if (!foreign) return;
    const Launch& launch = actor.warp->launch();
    while (*writer == 0 || *writer == me) writer++, begin++;
    fault(actor, format("data race on global memory: reads what %s has written in the same launch, and nothing orders "
                        "the two; %s", block_named(launch, *writer).c_str(), launch.memory.nearest(begin, 1).c_str()));
}

void GlobalRaces::write(const Actor& actor, Page& page, uint64_t begin, uint64_t end, uint32_t me, bool judged) {
    uint32_t* writer = page.writer + (begin & ((1u << PAGE_LOG2) - 1));
    bool foreign = false;
    for (uint64_t i = 0; i < end - begin; i++) foreign |= (writer[i] != 0) & (writer[i] != me);
    if (foreign && judged)
        for (uint64_t i = 0; i < end - begin; i++)
            if (writer[i] != 0 && writer[i] != me)
                conflicts_.push_back({begin + i, *(const uint8_t*)(begin + i), writer[i], actor.warp,
                                      actor.instruction});
    std::fill(writer, writer + (end - begin), me);
}

void GlobalRaces::finish(const Cluster& cluster) {
    const Launch& launch = cluster.launch;
    for (const Conflict& one : conflicts_) {
        if (*(const uint8_t*)one.address == one.before) continue;
        const Statement& at = *one.instruction->statement;
        const Block& block = one.warp->block;
        throw Fault(format("data race on global memory: %s and block (%u,%u,%u) write different values to one byte; %s"
                           "\n  in %s, block (%u,%u,%u) warp %u, PTX line %d: %s",
                           block_named(launch, one.writer).c_str(), block.index.x, block.index.y, block.index.z,
                           launch.memory.nearest(one.address, 1).c_str(), launch.code.kernel->name.c_str(),
                           block.index.x, block.index.y, block.index.z, one.warp->index, at.source.line,
                           at.text.c_str()));
    }
    conflicts_.clear();
    synchronised_ = nullptr;
}

}  // namespace ptx
