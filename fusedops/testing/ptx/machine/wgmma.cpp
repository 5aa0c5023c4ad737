// Asynchronous products of a warpgroup: wgmma. PTX ISA 9.7.15.
// Warps issue a product one by one and go on. It takes place when all four have: at once, or as late as the
// wgmma.wait_group, as the schedule says.
#include "wgmma.h"

#include <algorithm>

namespace ptx {

namespace {

struct Warpgroups {                                  // of a block
    std::vector<std::unique_ptr<Warpgroup>> all;
};

struct Issuer {                                      // of a warp
    uint64_t issued = 0;                             // products so far
    std::deque<uint64_t> groups;                     // where the groups end that were committed and not waited for
    bool fenced = false, ever_fenced = false;        // since the last wait; at all
    std::vector<std::unique_ptr<Accumulators>> sums;
};

Warpgroup& group_of(Warp& warp) {
    auto& all = warp.block.states.get<Warpgroups>().all;
    unsigned index = warp.index / WARPS;
    if (all.size() <= index) all.resize(index + 1);
    if (!all[index]) {
        if (WARPS * (index + 1) > warp.block.warps.size())
            throw Fault(format("warp %u is in no warpgroup: the block has %zu warps", warp.index,
                               warp.block.warps.size()));
        all[index] = std::make_unique<Warpgroup>();
        all[index]->block = &warp.block;
        all[index]->first_warp = WARPS * index;
        all[index]->agent = warp.cluster().fork(warp);
    }
    return *all[index];
}

uint64_t same_in_all_lanes(Warp& warp, const Slot& slot, const char* what) {
    const uint64_t* values = warp.values<uint64_t>(slot);
    for (unsigned lane = 1; lane < LANES; lane++)
        if (values[lane] != values[0])
            throw Fault(format("%s differs between lanes 0 and %u: 0x%llx and 0x%llx", what, lane,
                               (unsigned long long)values[0], (unsigned long long)values[lane]));
    return values[0];
}

// The product that this warp issues now; other warps of the group may have been here before.
Wgmma& enter(Warpgroup& group, Warp& warp, const Instruction& i, const WgmmaForm& form, uint64_t number) {
    uint64_t a = form.a_in_registers ? 0 : same_in_all_lanes(warp, i.slot[1], "the descriptor of A");
    uint64_t b = same_in_all_lanes(warp, i.slot[2], "the descriptor of B");
    Mask scale = warp.predicate(i.slot[3]);
    if (scale != 0 && scale != ALL) throw Fault(format("scale-d differs between lanes: 0x%08x", scale));
    if (number - group.first == group.products.size()) {
        Wgmma& made = group.products.emplace_back();
        made.instruction = &i, made.a = a, made.b = b, made.accumulate = scale != 0;
        return made;
    }
    Wgmma& product = group.numbered(number);
    const char* other = product.instruction != &i ? "instruction" : product.a != a ? "descriptor of A"
                        : product.b != b ? "descriptor of B" : product.accumulate != (scale != 0) ? "scale-d" : nullptr;
    if (other)
        throw Fault(format("warps %u to %u must execute the same wgmma.mma_async, but the %s differs: another warp was "
                           "at PTX line %d with A 0x%llx, B 0x%llx; this one has A 0x%llx, B 0x%llx",
                           group.first_warp, group.first_warp + WARPS - 1, other,
                           product.instruction->statement->source.line, (unsigned long long)product.a,
                           (unsigned long long)product.b, (unsigned long long)a, (unsigned long long)b));
    return product;
}

// The accumulators of an instruction, in flight from now on.
Accumulators& engage(Issuer& mine, Warp& warp, const Instruction& i) {
    if (!mine.ever_fenced) throw Fault("the first wgmma.mma_async needs a wgmma.fence.sync.aligned before it");
    auto found = std::find_if(mine.sums.begin(), mine.sums.end(), [&](auto& one) { return one->same_registers(i); });
    if (found == mine.sums.end()) {
        mine.sums.push_back(std::make_unique<Accumulators>());
        found = mine.sums.end() - 1;
        (*found)->instruction = &i;
    } else if (!(*found)->in_flight && !mine.fenced && (*found)->changed(warp)) {
        throw Fault("accumulator registers were written since the last product, "
                    "and no wgmma.fence.sync.aligned followed");
    }
    if (!(*found)->in_flight) (*found)->take(warp);
    return **found;
}

Step issue(Warp& warp, const Instruction& i, Mask active) {
    if (Step s = warp.aligned(i, active); s != Step::Next) return s;
    WgmmaForm form = WgmmaForm::of(i);
    Warpgroup& group = group_of(warp);
    Issuer& mine = warp.states.get<Issuer>();
    uint64_t number = mine.issued;
    unsigned me = warp.index % WARPS;
    Wgmma& product = enter(group, warp, i, form, number);
    Part& part = product.part[me];
    // Before the accumulators are in flight: a compiler may use one of them for A too, where both have the same value.
    for (unsigned r = 0; r < i.list[1].size(); r++) memcpy(part.a[r], warp.values<uint8_t>(i.list[1][r]), CORE_BYTES);
    part.sums = &engage(mine, warp, i);
    part.sums->last = number;
    if (form.sparse) memcpy(part.metadata, warp.values<uint32_t>(i.slot[4]), CORE_BYTES);
    warp.agent.release(part.known);
    product.issued |= 1u << me;
    mine.issued++;
    int when = warp.launch().schedule.async;
    bool now = when == Schedule::Early || (when == Schedule::Shuffled && warp.cluster().draw() % 2);
    if (product.issued == (1u << WARPS) - 1 && now) group.run_until(number + 1);
    return Step::Next;
}

Step fence(Warp& warp, const Instruction& i, Mask active) {
    if (Step s = warp.aligned(i, active); s != Step::Next) return s;
    Issuer& mine = warp.states.get<Issuer>();
    mine.fenced = mine.ever_fenced = true;
    return Step::Next;
}

Step commit(Warp& warp, const Instruction& i, Mask active) {
    if (Step s = warp.aligned(i, active); s != Step::Next) return s;
    Issuer& mine = warp.states.get<Issuer>();
    mine.groups.push_back(mine.issued);
    return Step::Next;
}

// A warp of the group that has not issued every product before `end`; WARPS: all have.
unsigned missing(Warpgroup& group, uint64_t end) {
    for (unsigned w = 0; w < WARPS; w++)
        if (end > group.done && !(group.numbered(end - 1).issued >> w & 1)) return w;
    return WARPS;
}

void check_registers_of_a(Warp& warp, const Wgmma& product) {
    const auto &sums = product.instruction->list[0], &registers = product.instruction->list[1];
    auto is_sum = [&](const Slot& a) {
        return std::any_of(sums.begin(), sums.end(), [&](const Slot& sum) { return sum.offset == a.offset; });
    };
    for (unsigned r = 0; r < registers.size(); r++)
        if (memcmp(product.part[warp.index % WARPS].a[r], warp.values<uint8_t>(registers[r]), CORE_BYTES) &&
            !is_sum(registers[r]))
            throw Fault(format("register %s of operand A was written before wgmma.wait_group: the wgmma.mma_async in "
                               "PTX line %d still reads it",
                               product.instruction->statement->operands[1].parts[r].name.c_str(),
                               product.instruction->statement->source.line));
}

void finish(Warpgroup& group, Warp& warp, Issuer& mine, uint64_t end) {
    unsigned me = warp.index % WARPS;
    for (; group.waited[me] < end; group.waited[me]++) check_registers_of_a(warp, group.numbered(group.waited[me]));
    warp.agent.clock.know(group.agent->id, group.numbered(end - 1).tick);
    for (auto& sums : mine.sums)
        if (sums->in_flight && sums->last < end) sums->give_back(warp), mine.fenced = false;
    uint64_t by_all = *std::min_element(group.waited, group.waited + WARPS);
    for (; group.first < by_all; group.first++) group.products.pop_front();
}

Step wait(Warp& warp, const Instruction& i, Mask active) {
    if (Step s = warp.aligned(i, active); s != Step::Next) return s;
    Issuer& mine = warp.states.get<Issuer>();
    uint64_t kept = i.number[0];
    if (mine.groups.size() <= kept) return Step::Next;
    uint64_t end = mine.groups[mine.groups.size() - kept - 1];
    Warpgroup& group = group_of(warp);
    if (end > group.waited[warp.index % WARPS]) {
        if (unsigned absent = missing(group, end); absent < WARPS) {
            unsigned other = group.first_warp + absent;
            int line = group.numbered(end - 1).instruction->statement->source.line;
            if (warp.block.warps[other]->done())
                throw Fault(format("warp %u ended without the wgmma.mma_async in PTX line %d, for which its warpgroup "
                                   "waits", other, line));
            return warp.wait([&] {
                return format("wgmma.wait_group, for warp %u to execute the wgmma.mma_async in PTX line %d", other,
                              line);
            });
        }
        group.run_until(end);
        finish(group, warp, mine, end);
    }
    mine.groups.erase(mine.groups.begin(), mine.groups.end() - kept);
    return Step::Next;
}

// Products whose results nobody can have used.
void check_all_waited(Cluster& cluster) {
    for (auto& block : cluster.blocks)
        for (auto& warp : block->warps) {
            Issuer* mine = warp->states.find<Issuer>();
            if (!mine || mine->issued == 0) continue;
            Warpgroup& group = group_of(*warp);
            uint64_t waited = group.waited[warp->index % WARPS];
            if (waited == mine->issued) continue;
            const Dim& in = block->index;
            throw Fault(format("warp %u of block (%u,%u,%u) ended without wgmma.wait_group for %llu of its "
                               "wgmma.mma_async%s; the first of them is in PTX line %d", warp->index, in.x, in.y, in.z,
                               (unsigned long long)(mine->issued - waited),
                               mine->groups.empty() || mine->groups.back() < mine->issued ? " (not committed)" : "",
                               group.numbered(waited).instruction->statement->source.line));
        }
}
const LeftoverCheck all_waited(check_all_waited);

}  // namespace

void Warpgroup::run_until(uint64_t end) {
    for (; done < end; done++) compute(*this, numbered(done));
}

bool Accumulators::same_registers(const Instruction& other) const {
    const auto &mine = instruction->list[0], &its = other.list[0];
    auto same = [](const Slot& a, const Slot& b) { return a.offset == b.offset; };
    return &mine == &its || (mine.size() == its.size() && std::equal(mine.begin(), mine.end(), its.begin(), same));
}

void Accumulators::take(Warp& warp) {
    const auto& registers = instruction->list[0];
    unsigned each = WgmmaForm::of(*instruction).sum == Sum::F16 ? 1 : 2;
    words.resize(registers.size() / each * 64);
    for (unsigned r = 0; r < registers.size(); r++) {
        uint32_t* values = warp.values<uint32_t>(registers[r]);
        if (std::find(values, values + LANES, IN_FLIGHT) != values + LANES)
            throw Fault(format("accumulator register %s is used by another wgmma.mma_async that was not waited for, in "
                               "another place of its registers",
                               instruction->statement->operands[0].parts[r].name.c_str()));
    }
    for (unsigned r = 0; r < registers.size(); r += each)
        load_sums(WgmmaForm::of(*instruction).sum, &words[r / each * 64], warp.values<uint32_t>(registers[r]),
                  warp.values<uint32_t>(registers[r + each - 1]));
    for (const Slot& slot : registers) std::fill_n(warp.values<uint32_t>(slot), LANES, IN_FLIGHT);
    in_flight = true;
}

void Accumulators::give_back(Warp& warp) {
    const auto& registers = instruction->list[0];
    Sum sum = WgmmaForm::of(*instruction).sum;
    unsigned each = sum == Sum::F16 ? 1 : 2;
    for (unsigned r = 0; r < registers.size(); r++) {
        const uint32_t* values = warp.values<uint32_t>(registers[r]);
        if (!std::all_of(values, values + LANES, [](uint32_t word) { return word == IN_FLIGHT; }))
            throw Fault(format("accumulator register %s was written before wgmma.wait_group: the wgmma.mma_async in "
                               "PTX line %d still adds to it",
                               instruction->statement->operands[0].parts[r].name.c_str(),
                               instruction->statement->source.line));
    }
    for (unsigned r = 0; r < registers.size(); r += each)
        store_sums(sum, &words[r / each * 64], warp.values<uint32_t>(registers[r]),
                   warp.values<uint32_t>(registers[r + each - 1]));
    in_flight = false;
}

bool Accumulators::changed(Warp& warp) const {
    const auto& registers = instruction->list[0];
    Sum sum = WgmmaForm::of(*instruction).sum;
    unsigned each = sum == Sum::F16 ? 1 : 2;
    for (unsigned r = 0; r < registers.size(); r += each) {
        uint32_t given[2][LANES];
        store_sums(sum, &words[r / each * 64], given[0], given[1]);
        for (unsigned n = 0; n < each; n++)
            if (memcmp(given[n], warp.values<uint32_t>(registers[r + n]), sizeof given[n])) return true;
    }
    return false;
}

namespace {

void shape(Decoder& d, WgmmaForm& form) {
    unsigned m;
    char rest;
    std::string name = d.next();
    if (sscanf(name.c_str(), "m%un%uk%u%c", &m, &form.columns, &form.depth, &rest) != 3 || m != 64)
        d.unsupported("." + name);
    d.has("satfinite");                              // sum_of asks again
    std::string type = d.next();
    form.a = element_named(d, d.next()), form.b = element_named(d, d.next());
    form.sum = sum_of(d, type, form.a, form.b);
    if (form.a == Element::B1) d.one_of({"and"}), d.one_of({"popc"});
    unsigned step = is_integer(form.a) && form.columns > 32 ? 16 : 8;
    if (form.columns == 0 || form.columns > 256 || form.columns % step || bits_of(form.a) == 4 ||
        form.depth * bits_of(form.a) != (form.sparse ? 512u : 256u) || (form.sparse && form.a == Element::B1))
        d.unsupported("this shape");
}

bool flag(Decoder& d, size_t index) {                // 0 or 1
    int64_t value = d.integer(index);
    if (value != 0 && value != 1) d.unsupported("0 or 1 was expected");
    return value;
}

bool negation(Decoder& d, size_t index) {            // 1 or -1
    int64_t value = d.integer(index);
    if (value != 1 && value != -1) d.unsupported("1 or -1 was expected");
    return value < 0;
}

void mma_async(Decoder& d, bool sparse) {
    d.ignore({"sync", "aligned"});
    WgmmaForm form = {};
    form.sparse = sparse;
    shape(d, form);
    Instruction& out = d.out;
    out.list[0] = d.write_list(0, B32);
    if (out.list[0].size() != form.columns / (form.sum == Sum::F16 ? 4 : 2))
        d.unsupported("the number of accumulator registers");
    form.a_in_registers = d.operand(1).kind == Operand::Vector;
    if (form.a_in_registers) out.list[1] = d.read_list(1, B32);
    else out.slot[1] = d.read(1, B64);
    if (form.a_in_registers && out.list[1].size() != 4) d.unsupported("A must have 4 registers");
    out.slot[2] = d.read(2, B64);
    size_t next = 3;
    if (sparse) {
        out.slot[4] = d.read(next++, B32);
        form.selector = d.integer(next++);
        if (form.selector >= selectors(form.a, form.depth)) d.unsupported("this sparsity selector");
    }
    out.slot[3] = d.read(next++, PRED);
    if (!is_integer(form.a)) {
        form.a_negated = negation(d, next++);
        form.b_negated = negation(d, next++);
    }
    if (form.a == Element::F16 || form.a == Element::BF16) {
        if (!form.a_in_registers) form.a_transposed = flag(d, next++);
        form.b_transposed = flag(d, next++);
    }
    if (next != d.operands()) d.unsupported(format("%zu operands were expected", next));
    form.keep_in(out);
    out.run = issue;
}

void plain(Decoder& d, Handler run) {
    d.ignore({"sync", "aligned"});
    d.out.run = run;
}

void wait_group(Decoder& d) {
    plain(d, wait);
    d.out.number[0] = d.integer(0);
}

}  // namespace

Table wgmma_instructions() {
    return {
        {"wgmma.fence", "9.7.15.7.1", [](Decoder& d) { plain(d, fence); }},
        {"wgmma.mma_async", "9.7.15.5.2", [](Decoder& d) { mma_async(d, false); }},
        {"wgmma.mma_async.sp", "9.7.15.6.4", [](Decoder& d) { mma_async(d, true); }},
        {"wgmma.commit_group", "9.7.15.7.2", [](Decoder& d) { plain(d, commit); }},
        {"wgmma.wait_group", "9.7.15.7.3", wait_group},
    };
}

}  // namespace ptx
