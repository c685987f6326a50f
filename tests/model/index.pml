/* Lookup in the index, without a lock, against who changes it under the arena lock: inserts, removes with tombstones, reuses
 * slots for other keys, rebuilds, and may die at any step; a thief rebuilds then. Three slots, a table of four entries, every
 * key hashes to entry 0. The protocol of index.c and write.c:
 *
 *   find     sequence number; walk the probe up to the first empty entry; each entry's slot: state word, key, and the
 *            generation again, where another one means begin anew; at a miss the sequence number again, where an odd or
 *            another one means begin anew; after TRIES ask every slot (sc_index_find, matches, probe, ask_the_truth)
 *   insert   key into a FREE slot; state; the first empty entry or tombstone (fill, begin_write, sc_index_insert)
 *   remove   FREE with a new generation; entry -> tombstone where another entry follows, else -> empty, as the tombstones
 *            before it, from the last to the first (forget, sc_index_remove)
 *   rebuild  sequence number odd; all empty; insert slot by slot; even (sc_index_rebuild)
 *
 * Key 1 is there all the time, so a lookup of it finds it, whatever happens meanwhile. A lookup of key 2, which comes and
 * goes, may miss it; but a slot and generation that it gives held that key.
 *
 * CHANGES: how many changes are made. KEY: which key is looked up.
 * MUTATION (0: none) must make the check fail:
 *   1 a removed entry becomes empty though another follows   2 a miss is not checked against the sequence number
 *   3 a rebuild does not make it odd                         4 the generation is not looked at again after the key
 *   5 after a rebuilder died the next begins with seq + 1    6 the tombstones before an entry that becomes empty are not
 *     looked at in order: one behind which an entry lies     7 even before the index is whole
 *   8 the old generation is kept when a slot is freed
 */
#define EMPTY 0
#define TOMB 1
#define SIZE 4
#define SLOTS 3
#ifndef CHANGES
#define CHANGES 3
#endif
#ifndef KEY
#define KEY 1
#endif
#ifndef TRIES
#define TRIES 2
#endif
#ifndef MUTATION
#define MUTATION 0
#endif
#define MAXGEN 5

byte index[SIZE];             /* EMPTY, TOMB, or slot + 2 */
byte seq = 0;
bool used[SLOTS];             /* the state word: with the generation */
byte gen[SLOTS];
byte key[SLOTS];
bool dead = false, done = false;
byte held[15];                /* for assertions: the key of slot * MAXGEN + generation */

inline insert_entry(s) {
  at = 0;
  do
  :: d_step { at < SIZE && index[at] > TOMB -> at++ }
  :: d_step { at < SIZE && index[at] <= TOMB -> index[at] = s + 2; at = 0 } break
  od
}

inline add(s, k) {
  d_step { key[s] = k; held[s * MAXGEN + gen[s]] = k }
  used[s] = true;
  insert_entry(s)
}

inline remove_entry(s) {
  at = 0;
  do
  :: d_step { at < SIZE && index[at] != s + 2 && index[at] != EMPTY -> at++ }
  :: d_step { index[at] == EMPTY -> at = 0 } break
  :: index[at] == s + 2 ->
     if
     :: d_step { MUTATION != 1 && index[(at + 1) % SIZE] != EMPTY -> index[at] = TOMB }
     :: d_step { MUTATION == 1 || index[(at + 1) % SIZE] == EMPTY -> index[at] = EMPTY }
#if MUTATION == 6
        at = 0;
        do
        :: d_step { at < SIZE && index[at] == TOMB -> index[at] = EMPTY; at++ }
        :: d_step { at < SIZE && index[at] != TOMB -> at++ }
        :: at == SIZE -> break
        od
#else
        do
        :: d_step { index[(at + SIZE - 1) % SIZE] == TOMB -> at = (at + SIZE - 1) % SIZE; index[at] = EMPTY }
        :: index[(at + SIZE - 1) % SIZE] != TOMB -> break
        od
#endif
     fi;
     at = 0;
     break
  od
}

inline drop(s) {
  d_step { used[s] = false; if :: MUTATION != 8 -> gen[s]++ :: else -> skip fi }
  remove_entry(s)
}

inline rebuild() {
#if MUTATION == 5
  seq++;
#elif MUTATION != 3
  if :: seq % 2 == 0 -> seq++ :: else -> skip fi;
#endif
#if MUTATION == 7
  seq++;
#endif
  at = 0;
  do
  :: d_step { at < SIZE -> index[at] = EMPTY; at++ }
  :: at == SIZE -> break
  od;
  slot = 0;
  do
  :: slot < SLOTS -> if :: used[slot] -> insert_entry(slot) :: else -> skip fi; slot++
  :: else -> break
  od;
  atomic { slot = 0; at = 0 }
#if MUTATION != 3 && MUTATION != 7
  seq++
#endif
}

inline change() {
  if
  :: !used[1] && gen[1] < MAXGEN - 1 -> add(1, 2)
  :: !used[1] && gen[1] < MAXGEN - 1 -> add(1, 3)
  :: !used[2] && gen[2] < MAXGEN - 1 -> add(2, 3)
  :: used[1] -> drop(1)
  :: used[2] -> drop(2)
  :: rebuild()
  fi
}

proctype changer() provided (!dead) {
  byte n = 0, at = 0, slot = 0;
  do
  :: n < CHANGES -> n++; change()
  :: n >= CHANGES -> break
  od;
  done = true
}

proctype thief() {
  byte at = 0, slot = 0;
  dead;
  rebuild();
  change()
}

proctype killer() { if :: !done -> dead = true :: skip fi }

/* matches: g is the generation in the state word that is read first. */
inline matches(s) {
  d_step { same = false; changed = false; g = gen[s]; if :: used[s] -> looked = true :: else -> looked = false fi }
  if
  :: looked ->
     d_step { same = (key[s] == KEY); looked = false }
#if MUTATION != 4
     changed = (gen[s] != g)
#endif
  :: else -> skip
  fi
}

inline answer(s) { assert(held[s * MAXGEN + g] == KEY); goto out }

proctype reader() {
  byte at = 0, n = 0, q, g, s; bool looked, same, changed;
  do
  :: n < TRIES ->
     d_step { n++; q = seq; at = 0; same = false; changed = false; g = 0; s = 0 }
     do
     :: d_step { at < SIZE && index[at] == TOMB -> at++ }
     :: at == SIZE || index[at] == EMPTY -> break
     :: d_step { at < SIZE && index[at] > TOMB -> s = index[at] - 2 }
        matches(s);
        if
        :: changed -> break
        :: !changed && same -> answer(s)
        :: d_step { !changed && !same -> at++; s = 0; g = 0 }
        fi
     od;
     if
     :: changed -> skip
     :: else ->
#if MUTATION == 2
        assert(KEY != 1); goto out
#else
        if
        :: q % 2 == 0 && seq == q -> assert(KEY != 1); goto out
        :: else -> skip
        fi
#endif
     fi
  :: n >= TRIES -> break
  od;
  s = 0;
  do
  :: s < SLOTS ->
     matches(s);
     if :: !changed && same -> answer(s) :: else -> s++ fi
  :: else -> break
  od;
  assert(KEY != 1);
out: skip
}

init {
  d_step {
    used[0] = true; key[0] = 1; held[0] = 1;
    used[1] = true; key[1] = 3; held[MAXGEN] = 3;
    index[0] = 3; index[1] = 2
  };
  atomic { run changer(); run thief(); run killer(); run reader() }
}
