// Copies of boxes of tensors between global and shared memory, tiled mode. PTX ISA 9.7.9.25.5.
#include <cstring>

#include "bulk.h"
#include "decoder.h"
#include "tensor_map.h"

namespace ptx {

namespace {

constexpr unsigned PIECE = 16, LINE = 128;            // bytes that swizzling moves as one, and within which it does

struct Box {
    TensorMap map;
    int32_t at[MAX_RANK];

    // Calls f(offset in the box, address, elements, inside) for the runs of each row that lie in or out of the tensor.
    template <class F> void each_run(F f) const {
        const unsigned bytes = map.element_bytes(), columns = map.count(0);
        unsigned index[MAX_RANK] = {};
        for (uint32_t offset = 0;; offset += columns * bytes) {
            uint64_t row = map.address;
            bool inside = true;
            for (unsigned dim = 1; dim < map.rank(); dim++) {
                int64_t place = at[dim] + (int64_t)index[dim] * map.element_strides[dim];
                inside &= place >= 0 && place < map.dims[dim];
                row += place * map.strides[dim - 1];
            }
            columns_of(offset, row, inside, f);
            unsigned dim = 1;
            while (dim < map.rank() && ++index[dim] == map.count(dim)) index[dim++] = 0;
            if (dim >= map.rank()) return;
        }
    }

  private:
    template <class F> void columns_of(uint32_t offset, uint64_t row, bool inside, F f) const {
        const int64_t bytes = map.element_bytes(), columns = map.count(0);
        const int64_t first = std::clamp<int64_t>(-(int64_t)at[0], 0, columns);
        const int64_t end = std::clamp<int64_t>((int64_t)map.dims[0] - at[0], 0, columns);
        if (!inside || first >= end) return f(offset, row, (unsigned)columns, false);
        if (first) f(offset, row, (unsigned)first, false);
        f(offset + first * bytes, row + (at[0] + first) * bytes, (unsigned)(end - first), true);
        if (end < columns) f(offset + end * bytes, row, (unsigned)(columns - end), false);
    }
};

// Moves bytes between a box in shared memory, whose first byte has offset `base`, and a plain buffer.
template <class F> void each_piece(const TensorMap& map, uint32_t base, uint32_t offset, uint32_t bytes, F f) {
    for (uint32_t done = 0; done < bytes;) {
        uint32_t at = base + offset + done, length = std::min(PIECE - at % PIECE, bytes - done);
        f(map.swizzled(at) - base, done, length);
        done += length;
    }
}

void fill(const TensorMap& map, uint8_t* to, uint32_t bytes) {
    if (!map.fill_nan) {
        memset(to, 0, bytes);
        return;
    }
    memset(to, 0xFF, bytes);                          // the NaN that arithmetic gives, 0x7FFF...
    for (uint32_t k = map.element_bytes() - 1; k < bytes; k += map.element_bytes()) to[k] = 0x7F;
}

// What swizzling touches around a box that does not end at a line.
unsigned span(const TensorMap& map) {
    unsigned bytes = map.box_bytes();
    return map.swizzle ? (bytes + LINE - 1) / LINE * LINE : bytes;
}

struct Transfer {
    Actor actor;
    std::shared_ptr<Agent> agent;
    Box box;
    uint64_t shared, mbarrier;
    Mask blocks;
    Combine combine;
    Bulk group;
    Memory& memory() const { return actor.warp->launch().memory; }
};

void load(const Transfer& t) {
    const TensorMap& map = t.box.map;
    const unsigned bytes = map.box_bytes();
    std::vector<uint8_t> held(bytes);
    t.box.each_run([&](uint32_t offset, uint64_t address, unsigned elements, bool inside) {
        unsigned length = elements * map.element_bytes();
        if (!inside) return fill(map, held.data() + offset, length);
        memcpy(held.data() + offset, t.memory().at(t.actor, Space::Global, address, length, 1, Access::Read), length);
    });
    auto deliver = [&](uint64_t to, uint64_t mbarrier) {
        if (&block_of(t.actor, to) != &block_of(t.actor, mbarrier))
            fault(t.actor, "the mbarrier of a tensor copy lies in another block than its destination");
        uint8_t* place = t.memory().at(t.actor, Space::Shared, to, span(map), LINE, Access::Write);
        each_piece(map, shared_offset(to), 0, bytes, [&](uint32_t into, uint32_t from, uint32_t length) {
            memcpy(place + into, held.data() + from, length);
        });
        complete(t.actor, mbarrier, bytes, *t.agent);
    };
    if (!t.blocks) return deliver(t.shared, t.mbarrier);
    for (Mask left = t.blocks; left; left &= left - 1) {
        uint64_t window = (uint64_t)(__builtin_ctz(left) + 1) << RANK_SHIFT;
        deliver(window | shared_offset(t.shared), window | shared_offset(t.mbarrier));
    }
}

void write_box(const Transfer& t, const std::vector<uint8_t>& held) {
    const unsigned bytes = t.box.map.element_bytes();
    t.box.each_run([&](uint32_t offset, uint64_t address, unsigned elements, bool inside) {
        if (!inside) return;
        uint8_t* to = t.memory().at(t.actor, Space::Global, address, elements * bytes, 1,
                                    t.combine ? Access::Atomic : Access::Write);
        if (t.combine) t.combine(to, held.data() + offset, elements * bytes);
        else memcpy(to, held.data() + offset, elements * bytes);
    });
    t.group->done = true;
    t.agent->release(t.group->after);
}

void store(Warp& warp, const Instruction& i, const Transfer& t) {
    const TensorMap& map = t.box.map;
    auto held = std::make_shared<std::vector<uint8_t>>(map.box_bytes());
    const uint8_t* from = t.memory().at(t.actor, Space::Shared, t.shared, span(map), LINE, Access::Read);
    each_piece(map, shared_offset(t.shared), 0, held->size(), [&](uint32_t at, uint32_t to, uint32_t length) {
        memcpy(held->data() + to, from + at, length);
    });
    t.group->read = true;
    t.agent->release(t.group->after_read);
    warp.cluster().defer(warp, i, [t, held] { write_box(t, *held); });
}

Element element_of(uint8_t type) {
    constexpr Element elements[TensorMap::TYPES] = {
        Element::U8,  Element::U16, Element::U32, Element::S32,  Element::U64, Element::S64, Element::F16,
        Element::F32, Element::F32, Element::F64, Element::BF16, Element::F32, Element::F32};
    return elements[type];
}

// slot: map, place in shared memory, mbarrier, mask of blocks; list[0]: coordinates
// number: offsets of map, shared memory and mbarrier, whether to store, reduction
Step issue(Warp& warp, const Instruction& i, Mask active) {
    for (; active; active &= active - 1) {
        unsigned lane = __builtin_ctz(active), rank = i.list[0].size();
        auto agent = warp.cluster().fork(warp);
        Transfer t{{&warp, &i, (int)lane, agent.get(), true}, agent, {}, 0, 0, 0, nullptr, nullptr};
        Actor reader{&warp, &i, (int)lane};
        t.box.map = tensor_map_at(reader, Space::Generic, warp.get(i.slot[0], lane) + i.number[0], rank);
        for (unsigned k = 0; k < rank; k++) t.box.at[k] = warp.values<int32_t>(i.list[0][k])[lane];
        t.shared = warp.get(i.slot[1], lane) + i.number[1];
        if (!i.number[3]) {
            t.mbarrier = warp.get(i.slot[2], lane) + i.number[2];
            if (i.slot[3] && !(t.blocks = warp.get(i.slot[3], lane))) fault(t.actor, "a multicast to no block");
            warp.cluster().defer(warp, i, [t] { load(t); });
            continue;
        }
        t.combine = combiner((Reduce)i.number[4], element_of(t.box.map.type));
        if (i.number[4] && !t.combine) fault(t.actor, "there is no such reduction for the type of the tensor map");
        t.group = open_bulk(warp, i, lane);
        warp.cluster().defer(warp, i, [&warp, &i, t] { store(warp, i, t); });
    }
    return Step::Next;
}

void map_and_coordinates(Decoder& d, size_t operand, unsigned rank) {
    const Operand& where = d.operand(operand);
    if (where.kind != Operand::Address || where.parts.size() != 2) d.unsupported("[map, {coordinates}] was expected");
    d.out.slot[0] = d.address(where, d.out.number[0]);
    const Operand& list = where.parts[1];
    if (list.kind != Operand::Vector) d.out.list[0] = {d.read(list, B32)};
    else
        for (auto& one : list.parts) d.out.list[0].push_back(d.read(one, B32));
    if (d.out.list[0].size() != rank) d.unsupported("the number of coordinates");
}

unsigned rank(Decoder& d) { return d.one_of({"1d", "2d", "3d", "4d", "5d"})[0] - '0'; }

void copy(Decoder& d) {
    unsigned dims = rank(d);
    std::string to = d.next(), from = d.next();
    d.ignore({"tile", "L2::cache_hint"});
    d.out.run = issue;
    if (to == "global" && from == "shared::cta") {
        d.one_of({"bulk_group"});
        map_and_coordinates(d, 0, dims);
        d.out.slot[1] = d.address(d.operand(1), d.out.number[1], false);
        d.out.number[3] = 1;
        return;
    }
    if ((to != "shared::cluster" && to != "shared::cta") || from != "global") d.unsupported("no such direction");
    d.one_of({"mbarrier::complete_tx::bytes"});
    d.out.slot[1] = d.address(d.operand(0), d.out.number[1], false);
    map_and_coordinates(d, 1, dims);
    d.out.slot[2] = d.address(d.operand(2), d.out.number[2], false);
    if (d.has("multicast::cluster")) d.out.slot[3] = d.read(3, B16);
}

void reduce(Decoder& d) {
    unsigned dims = rank(d);
    if (!d.has("global") || !d.has("shared::cta") || !d.has("bulk_group")) d.unsupported("no such direction");
    d.ignore({"tile", "L2::cache_hint"});
    d.out.number[4] = (int64_t)reduction_named(d.one_of({"add", "min", "max", "inc", "dec", "and", "or", "xor"}));
    map_and_coordinates(d, 0, dims);
    d.out.slot[1] = d.address(d.operand(1), d.out.number[1], false);
    d.out.number[3] = 1;
    d.out.run = issue;
}

Step check_map(Warp& warp, const Instruction& i, Mask active) {
    each_lane(active, [&](unsigned lane) {
        tensor_map_at({&warp, &i, (int)lane}, Space::Generic, warp.get(i.slot[0], lane) + i.number[0],
                      i.list[0].size());
    });
    return Step::Next;
}

void prefetch(Decoder& d) {
    unsigned dims = rank(d);
    d.ignore({"L2", "global", "tile", "L2::cache_hint"});
    map_and_coordinates(d, 0, dims);
    d.out.run = check_map;
}

}  // namespace

Table tensor_instructions() {
    return {
        {"cp.async.bulk.tensor", "9.7.9.25.5.2", copy},
        {"cp.reduce.async.bulk.tensor", "9.7.9.25.5.3", reduce},
        {"cp.async.bulk.prefetch.tensor", "9.7.9.25.5.4", prefetch},
    };
}

}  // namespace ptx
