/* world.c - the arena that is damaged, and what is known of it from outside: who wrote what, and under which key. */
#define _GNU_SOURCE
#include "fuzz.h"

#include <stdarg.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

void fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("fuzz: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    abort();
}

void tell(const char *format, ...)
{
    static int wanted = -1;
    if (wanted < 0)
        wanted = getenv("FUZZ_TELL") != NULL;
    if (!wanted)
        return;
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
}

uint32_t choose(struct input *in, uint32_t n)
{
    uint32_t value = 0;
    for (uint32_t most = n - 1; most && in->left; most >>= 8, in->left--)
        value = value << 8 | *in->data++;
    return value % n;
}

uint64_t choose_word(struct input *in)
{
    uint64_t word = 0;
    for (int i = 0; i < 8 && in->left; i++, in->left--)
        word = word << 8 | *in->data++;
    return word;
}

void world_make(struct world *w, uint64_t lease_us, uint32_t regions)
{
    struct sc_config c = {.capacity = BLOCKS * BLOCK, .block_size = BLOCK, .slots = SLOTS, .lanes = LANES,
                          .regions = regions, .read_lease_us = lease_us, .write_lease_us = lease_us, .lock_timeout_us = LOCK_TIMEOUT_US,
                          .eviction_window_us = lease_us};
    memset(w, 0, sizeof *w);
    for (int i = 0; i < BATCHES; i++)
        w->writes[i].handle = w->reads[i].handle = -1;
    w->fd = memfd_create("fuzz", MFD_CLOEXEC);
    if (w->fd < 0 || sc_format(w->fd, &c) < 0 || sc_plan(c.capacity, c.block_size, c.slots, c.lanes, c.regions, &w->g) < 0)
        fail("no arena");
    w->bytes = w->g.segment_bytes;
    w->map = mmap(NULL, w->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, w->fd, 0);
    if (w->map == MAP_FAILED)
        fail("no mapping");
}

void world_end(struct world *w)
{
    for (int h = 0; h < HANDLES; h++)
        world_detach(w, h, true);
    munmap(w->map, w->bytes);
    close(w->fd);
}

int world_attach(struct world *w, int h, const char *group, int32_t rank, uint32_t world_size)
{
    uint32_t pid = 0;
    struct sc_segment *s = calloc(1, sizeof *s);
    int rc = sc_segment_open(w->fd, true, s);
    if (rc == 0)
        rc = sc_join(s, group, (uint32_t)strlen(group), rank, world_size, &pid);
    if (rc == 0) {
        w->handles[h] = s;
        return 0;
    }
    if (s->lock_fd >= 0)
        sc_segment_shut(s);
    free(s);
    return rc;
}

/* What a handle had goes with it. */
void drop_batches(struct world *w, int h)
{
    for (int i = 0; i < BATCHES; i++) {
        w->writes[i].handle = w->writes[i].handle == h ? -1 : w->writes[i].handle;
        w->reads[i].handle = w->reads[i].handle == h ? -1 : w->reads[i].handle;
    }
    for (uint32_t v = 0; v < w->version_count; v++)
        for (uint32_t p = 0; p < w->versions[v].joined; p++)
            w->versions[v].parts[p].pending &= w->versions[v].parts[p].handle != h;
}

void world_detach(struct world *w, int h, bool dies)
{
    struct sc_segment *s = w->handles[h];
    if (!s)
        return;
    if (dies)
        sc_segment_shut(s); /* lets go of the lane's byte and of nothing else, as a death does */
    else if (sc_close(s) < 0)
        return;
    free(s);
    w->handles[h] = NULL;
    drop_batches(w, h);
}

/* Keys of many lengths, so that each part of the key's words is used; the first ones have one length. */
static uint32_t key_bytes(uint32_t key)
{
    static const uint32_t lengths[KEYS] = {8, 8, 8, 8, 1, 15, 16, 32, 33, 64};
    return lengths[key];
}

/* The width, or 0 where the keys have several lengths. */
uint32_t keys_pack(const uint32_t *keys, uint32_t n, char *data, uint32_t *ends)
{
    uint32_t end = 0, width = key_bytes(keys[0]);
    for (uint32_t i = 0; i < n; i++) {
        memset(data + end, 'a' + (int)keys[i], key_bytes(keys[i]));
        end += key_bytes(keys[i]);
        ends[i] = end;
        width = key_bytes(keys[i]) == width ? width : 0;
    }
    return width;
}

/* Never 0: memory that nobody wrote to is 0. */
static uint64_t word_of(uint32_t version) { return (uint64_t)(version + 1) << 32 | version * UINT32_C(0x9e3779b1); }

uint32_t version_new(struct world *w, uint32_t key, uint32_t nbytes, uint32_t layout)
{
    if (w->version_count == VERSIONS)
        fail("an input of too many writes");
    w->versions[w->version_count] = (struct version){.key = key, .nbytes = nbytes, .layout = layout, .writers = 1};
    return w->version_count++;
}

/* Another handle has reserved it, too. */
static bool shared(const struct version *v, uint32_t key, uint32_t writers, const struct sc_ref *ref)
{
    return writers > 1 && v->writers == writers && v->joined < writers && v->key == key && v->slot == ref->slot &&
           v->generation == ref->generation && v->nbytes == ref->nbytes && !v->published;
}

void version_reserve(struct world *w, int h, struct batch *b, uint32_t i, uint32_t writers)
{
    const struct sc_ref *ref = &b->refs[i];
    uint32_t at = w->version_count;
    for (uint32_t v = 0; v < w->version_count; v++)
        if (shared(&w->versions[v], b->keys[i], writers, ref))
            at = v;
    if (at == w->version_count)
        at = version_new(w, b->keys[i], (uint32_t)ref->nbytes, ref->layout);
    struct version *v = &w->versions[at];
    v->writers = writers;
    v->slot = ref->slot;
    v->generation = ref->generation;
    tell("  handle %d reserves version %u of key %u: slot %u generation %u at %llu, %u writers", h, at, b->keys[i], ref->slot,
         ref->generation, (unsigned long long)ref->offset, writers);
    b->versions[i] = at;
    b->parts[i] = v->joined++;
    v->parts[b->parts[i]] = (struct part_of_write){h, true, false};
}

void version_finish(struct world *w, uint32_t version, uint32_t part, int8_t status)
{
    tell("  version %u part %u: %d", version, part, status);
    w->versions[version].published |= status == SC_OK;
    w->versions[version].parts[part].pending = false;
}

void version_bytes(uint32_t version, char *data, uint32_t nbytes)
{
    uint64_t word = word_of(version);
    for (uint32_t at = 0; at < nbytes; at += 8)
        memcpy(data + at, &word, nbytes - at < 8 ? nbytes - at : 8);
}

/* A writer whose slot was damaged cannot know it, and would write over who has the memory then: nobody can notice that,
 * so here it does not write. */
static bool was_damaged(const struct world *w, uint32_t slot)
{
    enum { WORDS = sizeof(struct sc_slot) / 8 };
    for (uint32_t i = 0; i < WORDS && slot < SLOTS; i++)
        if (w->touched[slot * WORDS + i])
            return true;
    return false;
}

/* State and seal: the slot may have come back to a generation that it had, and the writer take the new object for its own. */
static bool was_erased(const struct world *w, uint32_t slot)
{
    const uint8_t *words = &w->touched[slot * (sizeof(struct sc_slot) / 8)];
    return slot < SLOTS && words[0] && words[offsetof(struct sc_slot, seal) / 8];
}

static bool still_writing(const struct world *w, const struct version *v, uint32_t lane, const struct sc_ref *ref)
{
    const struct sc_slot *r = (const struct sc_slot *)(w->map + w->g.slot_table) + ref->slot;
    const sc_word *share = (const sc_word *)(w->map + w->g.shares + lane * w->g.share_stride) + ref->slot;
    uint64_t state = sc_load(&r->state), word = sc_load(share);
    if (was_damaged(w, ref->slot) || sc_state_of(state) != SC_WRITING || sc_generation(state) != ref->generation)
        return false;
    return v->writers == 1 ? sc_owner_of(state) == lane
                           : sc_generation(word) == ref->generation && sc_stage(word) == SC_STAGE_WRITING;
}

int64_t region_add(struct world *w, int h, uint64_t nbytes)
{
    struct sc_region_spec spec = {.nbytes = nbytes, .device = 1};
    memset(spec.handle, 'h', sizeof spec.handle);
    memset(spec.uuid, 'u', sizeof spec.uuid);
    int64_t rc = sc_region_add(w->handles[h], &spec);
    if (rc >= 1 && rc <= REGIONS)
        w->device_bytes[rc - 1] = nbytes;
    return rc;
}

/* NULL: there is nobody who could look, or nothing to be said of what is there. */
static uint8_t *bytes_at(struct world *w, const struct sc_ref *ref)
{
    if (!ref->region)
        return w->map + w->g.payload + ref->offset;
    bool there = !w->regions_lie && ref->region <= REGIONS && ref->offset + ref->nbytes <= DEVICE_BYTES;
    return there ? w->device[ref->region - 1] + ref->offset : NULL;
}

bool version_fill(struct world *w, const struct batch *b, uint32_t i)
{
    const struct sc_ref *ref = &b->refs[i];
    struct version *v = &w->versions[b->versions[i]];
    struct part_of_write *p = &v->parts[b->parts[i]];
    const struct sc_segment *s = w->handles[p->handle];
    if (w->truncated)
        return true; /* whatever becomes of it: nobody looks any more */
    if (!p->pending)
        return !was_damaged(w, ref->slot);
    if (p->filled)
        return !was_erased(w, ref->slot);
    if (!s || !still_writing(w, v, s->lane, ref))
        return false;
    uint32_t half = v->nbytes / 16 * 8, from = b->parts[i] ? half : 0, upto = v->writers > 1 && !b->parts[i] ? half : v->nbytes;
    tell("  fill version %u of key %u from %u to %u: slot %u generation %u at %llu", b->versions[i], v->key, from, upto,
         ref->slot, ref->generation, (unsigned long long)ref->offset);
    uint8_t *bytes = bytes_at(w, ref);
    if (!bytes)
        return false;
    version_bytes(b->versions[i], (char *)bytes + from, upto - from);
    p->filled = true;
    return true;
}

/* Within what a region says of itself, and what was said when it was added. What changes in the midst of a call is not
 * held against it. */
static void check_extent(const struct world *w, struct sc_segment *s, const struct sc_ref *ref)
{
    struct sc_region_info info;
    if (ref->region > s->g.regions)
        fail("a ref in region %u", ref->region);
    if (w->concurrent || w->forged)
        return;
    bool known = sc_get_region(s, ref->region, &info) == 0 && info.state;
    uint64_t bytes = w->device_bytes[ref->region - 1], most = known ? info.blocks * info.block_size : bytes;
    if (ref->nbytes == 0 || ref->nbytes > most || ref->offset > most - ref->nbytes || ref->offset + ref->nbytes > bytes)
        fail("a ref of %llu bytes at %llu of region %u, which has %llu", (unsigned long long)ref->nbytes,
             (unsigned long long)ref->offset, ref->region, (unsigned long long)bytes);
}

void check_ref(const struct world *w, struct sc_segment *s, const struct sc_ref *ref)
{
    if (ref->region) {
        check_extent(w, s, ref);
        return;
    }
    if (ref->slot >= s->g.slots || ref->layout > SC_MAX_LAYOUTS)
        fail("a ref of slot %u, layout %u", ref->slot, ref->layout);
    if (ref->nbytes == 0 || ref->offset > s->g.capacity || ref->nbytes > s->g.capacity - ref->offset)
        fail("a ref of %llu bytes at %llu", (unsigned long long)ref->nbytes, (unsigned long long)ref->offset);
}

/* The version that a word tells. */
static const struct version *told_by(const struct world *w, uint64_t word)
{
    uint32_t version = (uint32_t)(word >> 32) - 1;
    return version < w->version_count && word == word_of(version) ? &w->versions[version] : NULL;
}

/* Nobody can notice that a part was never filled where its stage, a part of a share word, says that it was. */
static bool doubtful(const struct world *w, uint32_t key)
{
    for (uint32_t v = 0; w->shares_lie && v < w->version_count; v++)
        if (w->versions[v].key == key && w->versions[v].writers > 1)
            return true;
    return false;
}

/* What was read under a key, at this moment. */
void check_read(struct world *w, uint32_t key, const struct sc_ref *ref)
{
    uint64_t word = 0, at;
    const uint8_t *bytes = bytes_at(w, ref);
    if (!bytes || w->unsure || w->truncated || doubtful(w, key))
        return;
    memcpy(&word, bytes, ref->nbytes < 8 ? ref->nbytes : 8);
    for (at = 0; at + 8 <= ref->nbytes; at += 8)
        if (memcmp(bytes + at, &word, 8) != 0)
            fail("key %u: torn at byte %llu of %llu", key, (unsigned long long)at, (unsigned long long)ref->nbytes);
    const struct version *v = told_by(w, word);
    if (!v)
        fail("key %u: bytes that nobody wrote: %016llx", key, (unsigned long long)word);
    if (v->key != key)
        fail("key %u: bytes of key %u", key, v->key);
    /* Damage that falls into the middle of a call may make it say that it did not do what it did. */
    if (!v->published && !w->concurrent)
        fail("key %u: version %u was never published", key, (uint32_t)(word >> 32) - 1);
    if (v->nbytes != ref->nbytes || v->layout != ref->layout)
        fail("key %u: %llu bytes of layout %u, but it has %u of %u", key, (unsigned long long)ref->nbytes, ref->layout,
             v->nbytes, v->layout);
}
