#include "shadow.h"

#include "global_races.h"
#include "launch.h"

namespace ptx {

namespace {

constexpr unsigned AGENT_SHIFT = 50, TICK_SHIFT = 24, SITE_SHIFT = 4;
constexpr uint32_t MAX_TICK = (1u << (AGENT_SHIFT - TICK_SHIFT)) - 1;

unsigned agent_of(Epoch epoch) { return epoch >> AGENT_SHIFT; }
uint32_t tick_of(Epoch epoch) { return epoch >> TICK_SHIFT & MAX_TICK; }
uint32_t site_of(Epoch epoch) { return epoch >> SITE_SHIFT & ((1u << (TICK_SHIFT - SITE_SHIFT)) - 1); }

}  // namespace

// ---- one access
Touch::Touch(const Actor& actor, Block& block, Access access)
    : actor_(actor), block_(block), agent_(actor.agent ? *actor.agent : actor.warp->agent), access_(access),
      checks_(actor.warp->launch().checks) {
    if (!(checks_ & (Checks::Uninitialised | Checks::Races | Checks::Proxies)) || agent_.id >= MAX_AGENTS) return;
    if (agent_.now() > MAX_TICK) throw Fault("the run is too long to look for races: switch off the check \"races\"");
    if (!block.shared.shadow) block.shared.shadow = std::make_shared<Shadow>(block.shared.bytes.size());
    shadow_ = block.shared.shadow.get();
    shadow_->settle(block);
    if (shadow_->reads_.size() > shadow_->most_reads_) shadow_->drop_unused_reads();
    uint64_t site = actor.instruction - actor.warp->code.instructions.data();
    epoch_ = (Epoch)agent_.id << AGENT_SHIFT | (Epoch)agent_.now() << TICK_SHIFT | site << SITE_SHIFT |
             (actor.async_proxy ? ASYNC_PROXY : 0) | (strong(access) ? STRONG : 0);
}

void Touch::range(uint32_t offset, uint32_t bytes) {
    if (shadow_) shadow_->touch(*this, offset, bytes);
}

void Touch::lanes(Mask active, const uint32_t (&offsets)[LANES], uint32_t bytes) {
    each_range(active, offsets, bytes, [&](uint32_t begin, uint32_t end) { range(begin, end - begin); });
}

bool Touch::ordered(Epoch earlier) const {
    return tick_of(earlier) <= agent_.clock.of(agent_of(earlier)) ||
           (strong(access_) && (earlier & STRONG)) || !(checks_ & Checks::Races);
}

void Touch::after_write(Epoch write, uint32_t offset, uint32_t count) {
    if (write == 0) {
        if (!reads(access_) || !(checks_ & Checks::Uninitialised)) return;
        fault(actor_, format("reads shared memory that nobody has written: byte %u", offset));
    }
    if (!ordered(write)) {
        if (access_ != Access::Write || actor_.async_proxy) fault(actor_, race(write, true, offset));
        return suspect(write, offset, count);
    }
    if (actor_.async_proxy && reads(access_) && !strong(access_) && !(write & (ASYNC_PROXY | STRONG)) &&
        (checks_ & Checks::Proxies) && tick_of(write) > agent_.clock.proxied_of(agent_of(write)))
        unfenced(write, offset);
    fine_write_ = write;
}

void Touch::after_reads(uint32_t reads, uint32_t offset) {
    for (Epoch one : shadow_->reads_[reads])
        if (!ordered(one)) fault(actor_, race(one, false, offset));
    fine_reads_ = reads;
}

std::string Touch::name(Epoch epoch) const {
    unsigned id = agent_of(epoch);
    const Cluster& cluster = block_.cluster;
    const Statement& at = *actor_.warp->code.instructions[site_of(epoch)].statement;
    auto& files = cluster.launch.program.module.files;
    auto file = files.find(at.source.file);
    std::string source = file == files.end() ? "" : format(", %s:%d", file->second.c_str(), at.source.file_line);
    return format("%s, PTX line %d%s: %s", cluster.describe_agent(id).c_str(), at.source.line, source.c_str(),
                  at.text.c_str());
}

std::string Touch::race(Epoch earlier, bool earlier_wrote, uint32_t offset) const {
    const Dim& in = block_.index;
    return format("data race on shared memory of block (%u,%u,%u), byte %u: the %s by %s\n  is not ordered after "
                  "the %s by %s", in.x, in.y, in.z, offset, writes(access_) ? "write" : "read", name(epoch_).c_str(),
                  earlier_wrote ? "write" : "read", name(earlier).c_str());
}

void Touch::suspect(Epoch earlier, uint32_t offset, uint32_t count) {
    Shadow::Suspect one{offset, count, {}};
    std::copy_n(block_.shared.bytes.begin() + offset, count, one.before.begin());
    shadow_->suspects_.push_back(one);
    if (suspected_) return;
    suspected_ = true;
    shadow_->suspicion_ = race(earlier, true, offset) + "\n  (it wrote another value)";
}

void Touch::unfenced(Epoch write, uint32_t offset) const {
    fault(actor_, format("no fence.proxy.async between the generic write of shared byte %u by %s\n  and the read "
                         "through the async proxy by %s", offset, name(write).c_str(), name(epoch_).c_str()));
}

// ---- all bytes of a block
void Shadow::settle(const Block& block) {
    for (const Suspect& one : suspects_)
        if (!std::equal(one.before.begin(), one.before.begin() + one.count, block.shared.bytes.begin() + one.offset))
            throw Fault(suspicion_);
    suspects_.clear();
}

void settle_writes(Cluster& cluster) {
    for (auto& block : cluster.blocks)
        if (block->shared.shadow) block->shared.shadow->settle(*block);
    if (auto* races = cluster.launch.states.find<GlobalRaces>()) races->finish(cluster);
}

void Shadow::touch(Touch& touch, uint32_t offset, uint32_t bytes) {
    while (bytes) {
        uint32_t first = offset % GRANULE, count = std::min(GRANULE - first, bytes);
        Granule& granule = granules_[offset / GRANULE];
        if (granule.parts) visit_parts(touch, granule, offset - first, first, count);
        else if (count == GRANULE) visit(touch, granule, offset, count);
        else {
            Cell after = granule;                     // split only where the access changes anything
            visit(touch, after, offset, count);
            if (after.write != granule.write || after.reads != granule.reads) {
                split(granule);
                auto& parts = parts_[granule.parts];
                std::fill(parts.begin() + first, parts.begin() + first + count, after);
            }
        }
        offset += count, bytes -= count;
    }
}

inline void Shadow::visit(Touch& touch, Cell& cell, uint32_t offset, uint32_t count) {
    if (cell.write != touch.fine_write_ || cell.write == 0) touch.after_write(cell.write, offset, count);
    if (writes(touch.access_)) {
        if (cell.reads != touch.fine_reads_) touch.after_reads(cell.reads, offset);
        cell.write = touch.epoch_;
        cell.reads = 0;
        return;
    }
    if (cell.reads == touch.reads_to_ && cell.reads) return;
    if (cell.reads != touch.reads_from_ || !touch.reads_to_) {
        touch.reads_to_ = with_read(touch, cell.reads);
        touch.reads_from_ = cell.reads;
    }
    cell.reads = touch.reads_to_;
}

void Shadow::visit_parts(Touch& touch, Granule& granule, uint32_t offset, uint32_t first, uint32_t count) {
    auto& parts = parts_[granule.parts];
    for (uint32_t i = first; i < first + count; i++) visit(touch, parts[i], offset + i, 1);
    if (count == GRANULE) unite(granule);
}

void Shadow::split(Granule& granule) {
    if (free_parts_.empty()) {
        free_parts_.push_back(parts_.size());
        parts_.emplace_back();
    }
    granule.parts = free_parts_.back();
    free_parts_.pop_back();
    parts_[granule.parts].fill(granule);
}

void Shadow::unite(Granule& granule) {
    const Parts& parts = parts_[granule.parts];
    for (const Cell& one : parts)
        if (one.write != parts[0].write || one.reads != parts[0].reads) return;
    free_parts_.push_back(granule.parts);
    granule.write = parts[0].write, granule.reads = parts[0].reads, granule.parts = 0;
}

// The set with this access in it, without those that it comes after: whoever comes after it comes after them.
uint32_t Shadow::with_read(const Touch& touch, uint32_t reads) {
    auto& known = transitions_[(reads * 0x9E3779B1u ^ (touch.epoch_ >> SITE_SHIFT) * 0x85EBCA6Bu) >> 7 & 1023];
    if (known.from == reads && known.epoch == touch.epoch_) return known.to;
    std::vector<Epoch> made{touch.epoch_};
    for (Epoch one : reads_[reads])
        if (tick_of(one) > touch.agent_.clock.of(agent_of(one))) made.push_back(one);
    reads_.push_back(std::move(made));
    known = {reads, (uint32_t)reads_.size() - 1, touch.epoch_};
    return known.to;
}

void Shadow::drop_unused_reads() {
    std::vector<uint32_t> renamed(reads_.size());
    std::vector<std::vector<Epoch>> kept(1);
    auto keep = [&](Cell& cell) {
        if (cell.reads == 0) return;
        uint32_t& name = renamed[cell.reads];
        if (name == 0) {
            name = kept.size();
            kept.push_back(std::move(reads_[cell.reads]));
        }
        cell.reads = name;
    };
    for (Granule& granule : granules_) {
        if (!granule.parts) keep(granule);
        else for (Cell& one : parts_[granule.parts]) keep(one);
    }
    reads_ = std::move(kept);
    most_reads_ = std::max(MANY_READS, 2 * reads_.size());
    transitions_.fill({});
}

}  // namespace ptx
