// Blocks that leave their cluster while others still use their shared memory. PTX ISA 9.7.13.3.
#include "launch.h"
#include "shadow.h"

namespace ptx {

namespace {

// The end of a block counts as a write of all its shared memory by someone who knows what its warps knew in the end.
// Whatever another block did there must be ordered before it.
void find_late_accesses(Cluster& cluster) {
    if (cluster.blocks.size() == 1) return;
    for (auto& block : cluster.blocks) {
        Warp& first = *block->warps[0];
        Agent end = first.agent;
        for (auto& warp : block->warps) end.clock.join(warp->agent.clock);
        Actor actor{&first, &first.code.instructions.back(), -1, &end};
        Touch touch(actor, *block, Access::Write);
        if (!touch.needed()) continue;
        try {
            touch.range(0, block->shared.bytes.size());
        } catch (const Fault& race) {
            throw Fault(format("block (%u,%u,%u) of a cluster has exited while others may still use its shared memory:"
                               "\n  %s", block->index.x, block->index.y, block->index.z, race.what()));
        }
    }
}

const LeftoverCheck late(find_late_accesses);

}  // namespace

}  // namespace ptx
