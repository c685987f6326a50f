/* The arena lock: theft from the dead against takeover of their lane, and reaping against takeover. Lane 0 belongs to
 * process 0 and, when that is dead, to process 1, its successor; lanes 1 and 2 to processes 2 and 3. The protocol of lock.c,
 * lane.c and recover.c:
 *
 *   take over  lock the lane's byte (the kernel lets go of it at a death), then a new incarnation (sc_lane_take)
 *   take       compare-and-swap 0 -> own lane and incarnation; where the word names a dead holder (its lane has another
 *              incarnation, or else its byte is not locked), compare-and-swap from that word to the own: stolen (sc_lock_take)
 *   hold       who stole recovers first (sc_begin). Then the tables are changed, half-way of which they are broken. A lane
 *              leaves shares in its row. Lane 0 is reaped where it is dead: its incarnation is read first, then its byte,
 *              then the row is emptied, then it counts as reaped up to that incarnation (sc_reap_if_dead)
 *   give       the word := 0 (sc_lock_give)
 *
 * A dead process makes no step any more (provided), wherever it stopped; a stopped one is one that just is not run. Waiting
 * is asking again: a lost wake-up costs a slice of the futex wait, and is not modelled. What must hold: never two living
 * holders; nobody uses broken tables; no row is left behind by the dead.
 *
 * MUTATION (0: none) must make the check fail:
 *   1 the word has no incarnation      2 a successor leaves its predecessor's row as it is   3 no recovery after a theft
 *   4 theft by a plain store           5 a new incarnation before the byte is locked
 *   6 reaping reads the byte first and the incarnation second
 */
#ifndef KILLS
#define KILLS 2
#endif
#ifndef MUTATION
#define MUTATION 0
#endif
#define NOBODY 255
#define LANE(p) (p < 2 -> 0 : p - 1)

byte word_lane = 0, word_inc = 0;     /* the lock word: lane + 1, or 0 */
byte taken[4];                        /* a lane's byte: process + 1 */
byte incarnation[4], reaped_inc = 0;  /* reaped: of lane 0 only */
byte row = NOBODY;                    /* who left shares in lane 0 */
bool broken = false;                  /* the tables */
bool dead[5], left[5], killed = false;
byte inside = NOBODY;                 /* for assertions only */

inline enter(p) { d_step { assert(inside == NOBODY || dead[inside]); inside = p } }
inline leave(p) { d_step { assert(inside == p); inside = NOBODY } }

inline look_whether_alive(p) {
  alive = false;
  if
  :: seen_lane - 1 == LANE(p) -> skip
  :: else ->
     d_step { alive = (incarnation[seen_lane - 1] == seen_inc) }
     if
     :: alive -> d_step { alive = (taken[seen_lane - 1] != 0) }
     :: else -> skip
     fi
  fi
}

#if MUTATION == 1
#define SAME (word_lane == seen_lane)
#elif MUTATION == 4
#define SAME true
#else
#define SAME (word_lane == seen_lane && word_inc == seen_inc)
#endif

inline take(p) {
  do
  :: d_step { word_lane == 0 -> word_lane = LANE(p) + 1; word_inc = mine; stolen = false } break
  :: d_step { word_lane != 0 -> seen_lane = word_lane; seen_inc = word_inc }
     look_whether_alive(p);
     if
     :: !alive ->
        if
        :: d_step { SAME -> word_lane = LANE(p) + 1; word_inc = mine; stolen = true } break
        :: else -> skip
        fi
     :: else -> /* until something has changed; the core asks again every slice of its wait */
        (word_lane != seen_lane || word_inc != seen_inc || incarnation[seen_lane - 1] != seen_inc ||
         taken[seen_lane - 1] == 0)
     fi;
     d_step { seen_lane = 0; seen_inc = 0 }
  od;
  atomic { seen_lane = 0; seen_inc = 0; alive = false }
  enter(p)
}

inline recover() {
#if MUTATION == 3
  stolen = false;
#else
  if
  :: stolen ->
     broken = true; /* what is derived is emptied first */
     broken = false;
     stolen = false
  :: else -> skip
  fi;
#endif
  assert(!broken)
}

inline reap_lane_0(p) {
#if MUTATION == 6
  alive = (taken[0] != 0);
  inc = incarnation[0];
#else
  inc = incarnation[0];
  alive = (taken[0] != 0);
#endif
  if
  :: !alive && reaped_inc != inc -> row = NOBODY; reaped_inc = inc
  :: else -> skip
  fi;
  d_step { inc = 0; alive = false }
}

inline hold(p) {
  recover();
  if
  :: p == 1 ->
     if /* its row is empty before it uses it, unless it was reaped */
     :: MUTATION != 2 -> row = NOBODY
     :: else -> skip
     fi;
     assert(row == NOBODY)
  :: else -> skip
  fi;
  broken = true;
  broken = false;
  if
  :: p < 2 -> d_step { assert(row == NOBODY || row == p); row = p } /* it has shares from now on */
  :: p >= 2 -> reap_lane_0(p)
  fi
}

inline give(p) {
  leave(p);
  word_lane = 0
}

proctype process(byte p) provided (!dead[p]) {
  byte seen_lane = 0, seen_inc = 0, mine = 1, inc = 0; bool alive = false, stolen = false;
  if
  :: p == 1 ->
#if MUTATION == 5
     d_step { incarnation[0]++; mine = incarnation[0] }
     d_step { taken[0] == 0 -> taken[0] = 2 }
#else
     d_step { taken[0] == 0 -> taken[0] = 2 }
     d_step { incarnation[0]++; mine = incarnation[0] }
#endif
  :: else -> skip
  fi;
  take(p);
  hold(p);
  give(p);
  left[p] = true
}

proctype killer() {
  byte n = 0, p;
  do
  :: n < KILLS ->
     n++;
     if
     :: p = 0
     :: p = 1
     :: p = 2
     :: p = 3
     fi;
     if
     :: d_step { !dead[p] -> dead[p] = true; if :: taken[LANE(p)] == p + 1 -> taken[LANE(p)] = 0 :: else -> skip fi }
     :: dead[p]
     fi
  :: break
  od;
  killed = true
}

/* When all that live have done what they do: a lane of its own, which reaps and finds nothing left of the dead. */
proctype last() {
  byte seen_lane = 0, seen_inc = 0, mine = 9, inc = 0; bool alive = false, stolen = false;
  killed && (left[0] || dead[0]) && (left[1] || dead[1] || taken[0] == 1) && (left[2] || dead[2]) && (left[3] || dead[3]);
  take(4);
  recover();
  reap_lane_0(4);
  assert(row == NOBODY || !dead[row]);
  give(4);
  left[4] = true
}

init {
  atomic {
    taken[0] = 1; taken[1] = 3; taken[2] = 4; taken[3] = 5;
    incarnation[0] = 1; incarnation[1] = 1; incarnation[2] = 1; incarnation[3] = 9;
    run process(0); run process(1); run process(2); run process(3); run killer(); run last()
  };
  timeout -> assert(left[4])
}
