// Clusters of blocks, fences, and instructions that only guide the hardware. PTX ISA 9.7.13.3 and 9.7.13.4.
#include "decoder.h"
#include "launch.h"

namespace ptx {

namespace {

struct ClusterBarrier {
    std::vector<Mask> arrived;       // in this phase, by warp of the cluster
    std::vector<Mask> owing;         // have arrived and not waited yet
    std::vector<Warp*> warps;
    Clock arriving, done;

    explicit ClusterBarrier(Cluster& cluster) {
        for (auto& block : cluster.blocks)
            for (auto& warp : block->warps) warps.push_back(warp.get());
        arrived.resize(warps.size()), owing.resize(warps.size());
    }
    // Threads that have exited count as arrived.
    void settle() {
        for (size_t w = 0; w < warps.size(); w++)
            if (warps[w]->alive & ~arrived[w]) return;
        std::fill(arrived.begin(), arrived.end(), 0);
        done = std::move(arriving);
        arriving = Clock();
    }
};

struct ClusterBarrierHolder {
    std::unique_ptr<ClusterBarrier> barrier;
};

ClusterBarrier& barrier_of(Warp& warp) {
    auto& holder = warp.cluster().states.get<ClusterBarrierHolder>();
    if (!holder.barrier) holder.barrier = std::make_unique<ClusterBarrier>(warp.cluster());
    return *holder.barrier;
}

size_t number_of(const Warp& warp) { return warp.block.rank * warp.block.warps.size() + warp.index; }

Step aligned_if_asked(Warp& warp, const Instruction& i, Mask active) {
    if (!i.number[0] || active == warp.alive) return Step::Next;
    if (Mask skipped = warp.group->mask & ~active)
        throw Fault(format("divergence: %s is for all lanes of the warp, its guard does not hold in lanes 0x%08x",
                           i.statement->full_name().c_str(), skipped));
    return warp.wait_for_lanes(i, warp.alive, active);
}

Step cluster_arrive(Warp& warp, const Instruction& i, Mask active) {
    if (Step step = aligned_if_asked(warp, i, active); step != Step::Next) return step;
    ClusterBarrier& barrier = barrier_of(warp);
    size_t w = number_of(warp);
    if (Mask twice = barrier.owing[w] & active)
        throw Fault(format("barrier.cluster.arrive by lanes 0x%08x that have arrived and not waited yet", twice));
    barrier.arrived[w] |= active, barrier.owing[w] |= active;
    if (i.number[1]) warp.agent.release(barrier.arriving);
    else barrier.arriving.join(warp.agent.fenced);    // .relaxed: what came before the last fence
    barrier.settle();
    return Step::Next;
}

std::string missing(const ClusterBarrier& barrier) {
    std::string text = "barrier.cluster: not there are";
    for (size_t w = 0; w < barrier.warps.size(); w++) {
        const Warp& warp = *barrier.warps[w];
        if (Mask lanes = warp.alive & ~barrier.arrived[w])
            text += format(" block %u warp %u lanes 0x%08x,", warp.block.rank, warp.index, lanes);
    }
    text.pop_back();
    return text;
}

Step cluster_wait(Warp& warp, const Instruction& i, Mask active) {
    if (Step step = aligned_if_asked(warp, i, active); step != Step::Next) return step;
    ClusterBarrier& barrier = barrier_of(warp);
    size_t w = number_of(warp);
    if (Mask never = active & ~barrier.owing[w])
        throw Fault(format("barrier.cluster.wait by lanes 0x%08x that have not arrived", never));
    barrier.settle();
    if (barrier.arrived[w] & active) return warp.wait([&] { return missing(barrier); });
    barrier.owing[w] &= ~active;
    warp.agent.acquire(barrier.done);
    return Step::Next;
}

void barrier_cluster(Decoder& d) {
    bool arrives = d.one_of({"arrive", "wait"}) == "arrive";
    d.out.number[1] = d.one_of({"release", "relaxed", "acquire"}, false) != "relaxed";
    d.out.number[0] = d.has("aligned");
    d.out.run = arrives ? cluster_arrive : cluster_wait;
}

// The same place in another block of the cluster. slot: d, a, rank. number: offset, generic
template <class T> Step map_address(Warp& warp, const Instruction& i, Mask active) {
    const uint32_t* rank = warp.values<uint32_t>(i.slot[2]);
    T *d = warp.values<T>(i.slot[0]), *a = warp.values<T>(i.slot[1]);
    each_lane(active, [&](unsigned lane) {
        unsigned size = warp.cluster().blocks.size();
        if (rank[lane] >= size)
            fault({&warp, &i, (int)lane}, format("mapa to block %u of a cluster of %u", rank[lane], size));
        uint64_t from = a[lane] + i.number[0], window = i.number[1] ? SHARED_WINDOW : 0;
        if (i.number[1] && from >> 56 != SHARED_WINDOW >> 56)
            fault({&warp, &i, (int)lane}, format("mapa of 0x%llx: not an address in shared memory",
                                                 (unsigned long long)from));
        d[lane] = window | (uint64_t)(rank[lane] + 1) << RANK_SHIFT | shared_offset(from);
    });
    return Step::Next;
}

void mapa(Decoder& d) {
    bool generic = !d.has("shared::cluster");
    Type type = d.type();
    d.out.slot[0] = d.write(0, type), d.out.slot[1] = d.read(1, type), d.out.slot[2] = d.read(2, B32);
    d.out.number[1] = generic;
    if (type.bytes == 4 && generic) d.unsupported("a generic address has 64 bits");
    d.out.run = type.bytes == 4 ? map_address<uint32_t> : map_address<uint64_t>;
}

template <class T> Step rank_of(Warp& warp, const Instruction& i, Mask active) {
    uint32_t* d = warp.values<uint32_t>(i.slot[0]);
    const T* a = warp.values<T>(i.slot[1]);
    each_lane(active, [&](unsigned lane) {
        uint64_t rank = (uint64_t)a[lane] << 8 >> 8 >> RANK_SHIFT;
        d[lane] = rank ? rank - 1 : warp.block.rank;
    });
    return Step::Next;
}

void getctarank(Decoder& d) {
    d.has("shared::cluster");
    Type type = d.type();
    d.out.slot[0] = d.write(0, B32), d.out.slot[1] = d.read(1, type);
    d.out.run = type.bytes == 4 ? rank_of<uint32_t> : rank_of<uint64_t>;
}

Step nothing(Warp&, const Instruction&, Mask) { return Step::Next; }

Step fence_proxies(Warp& warp, const Instruction&, Mask) {
    proxy_fence(warp);
    return Step::Next;
}

void fence_proxy_async(Decoder& d) {
    d.ignore({"global", "shared::cta", "shared::cluster"});
    d.out.run = fence_proxies;
}

void fence_proxy_generic(Decoder& d) {
    d.ignore({"acquire", "release", "cluster", "sync_restrict::shared::cta", "sync_restrict::shared::cluster"});
    d.out.run = fence_proxies;
}

Step fence_memory(Warp& warp, const Instruction&, Mask) {
    memory_fence(warp);
    return Step::Next;
}

void fence(Decoder& d) {
    d.ignore({"sc", "acq_rel", "acquire", "release", "cta", "cluster", "gpu", "sys", "sync_restrict::shared::cta",
              "sync_restrict::shared::cluster"});
    d.out.run = fence_memory;
}

void membar(Decoder& d) {
    d.ignore({"cta", "gl", "sys"});
    d.out.run = fence_memory;
}

// It orders the mbarrier.init before it; that it orders all else too is more than the ISA promises.
void fence_mbarrier_init(Decoder& d) {
    d.ignore({"release", "cluster"});
    d.out.run = fence_memory;
}

void fence_proxy_alias(Decoder& d) { d.out.run = nothing; }

// Launches run one after another, so what a kernel depends on has always ended.
void griddepcontrol(Decoder& d) {
    d.one_of({"launch_dependents", "wait"});
    d.out.run = nothing;
}

Step check_registers(Warp& warp, const Instruction& i, Mask active) {
    return warp.aligned(i, active);
}

// The count of registers of a warp is not limited here.
void setmaxnreg(Decoder& d) {
    d.one_of({"inc", "dec"});
    d.ignore({"sync", "aligned"});
    d.type();
    int64_t count = d.integer(0);
    if (count < 24 || count > 256 || count % 8) d.unsupported("24 to 256 registers, a multiple of 8");
    d.out.run = check_registers;
}

}  // namespace

Table cluster_instructions() {
    return {
        {"barrier.cluster", "9.7.13.3", barrier_cluster},
        {"mapa", "9.7.9.23", mapa},
        {"getctarank", "9.7.9.24", getctarank},
        {"fence", "9.7.13.4", fence},
        {"membar", "9.7.13.4", membar},
        {"fence.proxy.async", "9.7.13.4", fence_proxy_async},
        {"fence.proxy.async::generic", "9.7.13.4", fence_proxy_generic},
        {"fence.proxy.alias", "9.7.13.4", fence_proxy_alias},
        {"fence.mbarrier_init", "9.7.13.4", fence_mbarrier_init},
        {"griddepcontrol", "9.7.13.13", griddepcontrol},
        {"setmaxnreg", "9.7.19.5", setmaxnreg},
    };
}

}  // namespace ptx
