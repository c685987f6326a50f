/* Collective writes: one slot that N lanes fill together, of L lanes that join, fill, finish, abort, close or die at any
 * step. The protocol of slot.h, share.h, write.c and recover.c:
 *
 *   join     under the arena lock: a FREE slot -> WRITING, then the own stage := WRITING; or, where the slot is WRITING,
 *            unsealed, not detached, has fewer than N stages and none of the own lane: the own stage := WRITING
 *   finish   no lock: asked := the most; own stage WRITING -> DONE, which releases the part's bytes; look at the state word
 *            again: detached means clean up; count the lanes that are DONE; if N: seal (compare-and-swap, one winner); the
 *            winner grants what was asked, then READY
 *   abandon  under the arena lock: DETACHED by compare-and-swap, which loses against READY; then the lane's part is let go
 *   let go   under the arena lock: where no other lane is WRITING (and no live sealer is at work), the slot is freed, which
 *            voids all stages by its generation; else the own stage := 0, and the other will look
 *   reap     a dead lane WRITING: abandon. DONE: let go where detached; abandon where it is the sealer, or all are DONE and
 *            nobody sealed, or no other live lane has a part; else its part is done and stays. A close is the same
 *   recover  whoever steals the arena lock: a WRITING slot without any stage, unsealed, is freed
 *
 * A dead lane makes no step any more (provided), wherever it stopped. What must hold: READY only with every part's bytes;
 * one publish and one set of grants a generation, of what was asked; nobody's memory is reused while it lives and may
 * write; when all have closed or died and the dead are reaped, the slot is not WRITING.
 *
 * ROUNDS, KILLS: writes a lane, deaths in all. SECOND: one more thread in lane 0 that finishes or
 * aborts what its lane writes.
 * MUTATION (0: none) must make the check fail:
 *   1 no look at the state after DONE       2 reaping keeps a part that is DONE of a detached slot
 *   3 own stage := 0 before the look at the others, and no recovery of what a death in between leaves
 *   4 own stage before the state            5 reaping keeps DONE parts though nobody else lives
 *   6 publishing without a seal             7 DONE before the bytes
 *   8 let go without a look at the others   9 the own stage goes before DETACHED
 *  10 READY before the grants              11 reaping ignores a dead sealer
 *  12 the seal is a plain store            13 a part counts in any generation
 *  14 the look at the others before DETACHED
 */
#define FREE 0
#define WRITING 1
#define READY 2
#define DONE 2
#ifndef N
#define N 2
#endif
#ifndef L
#define L 3
#endif
#ifndef ROUNDS
#define ROUNDS 1
#endif
#ifndef KILLS
#define KILLS 2
#endif
#ifndef SECOND
#define SECOND 0
#endif
#ifndef MUTATION
#define MUTATION 0
#endif
#define NOBODY 255

/* The state word: changed in one step. */
byte state = FREE, gen = 1, owner = NOBODY, asked = 0;
bool sealed = false, detached = false;
/* The lanes' share words. */
byte wgen[L], stage[L], reserved[L];
byte lock = 0; /* 0, or lane + 1; L + 1: the last process */
bool dead[L], closed[L], idle[L], reaped[L], busy = false, done = false;

/* For assertions only: which generation's bytes lie in each lane's part, who joined which, what was done to which. */
byte content[L], member[L], published = 0, granted = 0, most = 0;

#define STAGE(l) (wgen[l] == gen -> stage[l] : 0)
#define LIVES(l) (!dead[l] && !closed[l])
#define GONE(l) (dead[l] || ((closed[l] || idle[l]) && !(busy && l == 0)))
#define MINE(g) (state == WRITING && gen == g)

/* One step a lane's word: counts those for which `what` holds. */
#define EACH_LANE(count, what) \
  count = 0; i = 0; \
  do \
  :: d_step { i < L && (what) -> count++; i++ } \
  :: d_step { i < L && !(what) -> i++ } \
  :: d_step { i == L -> i = 0 } break \
  od

inline set_stage(l, s) { d_step { if :: wgen[l] != gen -> wgen[l] = gen; reserved[l] = 0 :: else -> skip fi; stage[l] = s } }
inline free_slot() { d_step {
  state = FREE; gen++; owner = NOBODY; asked = 0; sealed = false; detached = false;
  most = 0; published = 0; granted = 0 } }

inline let_go(l) {
#if MUTATION == 3
  set_stage(l, 0);
#endif
#if MUTATION == 8
  all = 0;
#else
  EACH_LANE(all, i != l && STAGE(i) == WRITING);
#endif
  if
  :: all == 0 && !(sealed && owner != l && LIVES(owner)) -> free_slot()
  :: else -> set_stage(l, 0)
  fi
}

inline abandon(l) {
#if MUTATION == 9
  set_stage(l, 0);
#endif
#if MUTATION == 14
  EACH_LANE(all, i != l && STAGE(i) == WRITING);
  if
  :: all == 0 && state == WRITING -> free_slot()
  :: d_step { all > 0 && state == WRITING -> detached = true } set_stage(l, 0)
  :: else -> skip
  fi;
#endif
  if
  :: d_step { MUTATION != 14 && state == WRITING -> detached = true } let_go(l)
  :: else -> skip
  fi
}

/* The lane is dead, or it is the own one at close. */
inline reap(l) {
  if
  :: state == WRITING && STAGE(l) == WRITING -> abandon(l)
  :: state == WRITING && STAGE(l) == DONE ->
     EACH_LANE(all, STAGE(i) == DONE);
     EACH_LANE(others, i != l && STAGE(i) != 0 && LIVES(i));
     if
#if MUTATION != 2
     :: detached -> let_go(l)
#endif
#if MUTATION != 11
     :: !detached && sealed && owner == l -> abandon(l)
#endif
     :: !detached && !sealed && all == N -> abandon(l)
#if MUTATION != 5
     :: !detached && !sealed && all < N && others == 0 -> abandon(l)
#endif
     :: else -> skip
     fi
  :: else -> skip
  fi;
  d_step { reaped[l] = true; all = 0; others = 0 }
}

inline reap_dead(me) {
  do
  :: atomic { r < L && r != me && dead[r] && !reaped[r] -> reap(r) }
  :: atomic { r < L && !(r != me && dead[r] && !reaped[r]) -> r++ }
  :: atomic { r == L -> r = 0; break }
  od
}

inline recover() {
  EACH_LANE(all, STAGE(i) != 0);
  if
#if MUTATION != 3 && MUTATION != 4
  :: state == WRITING && all == 0 && !sealed -> free_slot()
#endif
  :: else -> skip
  fi;
  stolen = false
}

inline take_lock(me) {
  if
  :: d_step { lock == 0 -> lock = me + 1 }
  :: d_step { lock != 0 && lock <= L && dead[lock - 1] -> lock = me + 1; stolen = true } recover()
  fi
}

inline give_lock() { lock = 0 }

inline join(me) {
  ok = false;
  take_lock(me);
  if
  :: reap_dead(me)
  :: skip
  fi;
  if
  :: state == READY -> free_slot() /* evicted: its shares are share.pml's */
  :: else -> skip
  fi;
  if
#if MUTATION == 4
  :: state == FREE ->
     set_stage(me, WRITING);
     d_step { state = WRITING; owner = me; ok = true }
#else
  :: d_step { state == FREE -> state = WRITING; owner = me }
     d_step { set_stage(me, WRITING); ok = true }
#endif
  :: state == WRITING && !sealed && !detached && STAGE(me) == 0 ->
     EACH_LANE(all, STAGE(i) != 0);
     if
     :: d_step { all < N -> set_stage(me, WRITING); ok = true }
     :: else -> skip
     fi
  :: else -> skip
  fi;
  d_step { g = gen; all = 0; if :: ok -> member[me] = gen :: else -> g = 0 fi };
  give_lock()
}

inline clean_up(me) {
  take_lock(me);
  if
  :: MINE(g) && detached && STAGE(me) != 0 -> let_go(me)
  :: else -> skip
  fi;
  give_lock()
}

inline grant() {
  d_step {
    granted = granted + (gen == g);
    i = 0;
    do
    :: i < k -> if :: wgen[i] != g -> wgen[i] = g; stage[i] = 0; reserved[i] = 1 :: else -> reserved[i]++ fi; i++
    :: else -> break
    od;
    i = 0
  }
}

inline make_ready(me) {
  d_step {
    if
    :: MINE(g) && !detached && (MUTATION == 6 || (sealed && owner == me)) ->
       state = READY; published++;
       assert(published == 1);
       all = 0; i = 0;
       do
       :: i < L -> if :: member[i] == g -> all++; assert(content[i] == g) :: else -> skip fi; i++
       :: else -> break
       od;
       assert(all == N);
       assert(MUTATION == 10 || (granted == 1 && k == most));
       i = 0;
       do
       :: i < most -> assert(wgen[i] == g && reserved[i] == 1); i++
       :: else -> break
       od;
       i = 0
    :: else -> skip
    fi
  }
}

inline seal_and_publish(me) {
  if
  :: d_step { MINE(g) && !detached && (!sealed || MUTATION == 12) -> sealed = (MUTATION != 6); owner = me; k = asked }
#if MUTATION == 10
     make_ready(me); grant()
#else
     grant(); make_ready(me)
#endif
  :: else -> skip
  fi
}

/* k: ranks asked for. */
inline finish(me) {
  if
  :: d_step { MINE(g) && !detached -> asked = (asked > k -> asked : k) }
     if
     :: d_step { wgen[me] == g && stage[me] == WRITING ->
                 stage[me] = DONE; if :: gen == g && k > most -> most = k :: else -> skip fi }
        EACH_LANE(all, (wgen[i] == g || MUTATION == 13) && stage[i] == DONE);
        if
        :: all == N -> seal_and_publish(me)
        :: else -> skip
        fi;
#if MUTATION != 1
        if
        :: MINE(g) && detached -> clean_up(me)
        :: else -> skip
        fi
#endif
     :: else -> skip
     fi
  :: else -> clean_up(me)
  fi;
  d_step { all = 0; k = 0 }
}

inline abort_part(me) {
  take_lock(me);
  if
  :: MINE(g) && STAGE(me) == WRITING -> abandon(me)
  :: else -> skip
  fi;
  give_lock()
}

proctype lane(byte me) provided (!dead[me]) {
  byte n = 0, g = 0, i = 0, r = 0, k = 0, all = 0, others = 0; bool ok, stolen = false;
  do
  :: n < ROUNDS ->
     n++;
     join(me);
     if
     :: ok ->
#if MUTATION == 7
        finish(me);
#endif
        d_step { assert(gen == g || MUTATION == 7); content[me] = 100 + me } /* half-written */
        d_step { assert(gen == g || MUTATION == 7); content[me] = g }
        if
#if MUTATION != 7
        :: k = me; finish(me)
#endif
        :: abort_part(me)
        fi
     :: else -> skip
     fi;
     d_step { all = 0; g = 0; ok = false }
  :: else -> break
  od;
  if
  :: !busy || me != 0 -> /* a close waits for the other threads */
     take_lock(me);
     reap(me);
     closed[me] = true;
     give_lock()
  :: idle[me] = true /* stays, and does nothing more */
  fi
}

/* Another thread of lane 0. */
proctype second() provided (!dead[0]) {
  byte g = 0, i = 0, r = 0, k = 0, all = 0, others = 0; bool ok, stolen = false;
  d_step { state == WRITING && STAGE(0) == WRITING && content[0] == gen && !closed[0] -> g = gen; busy = true };
  if
  :: finish(0)
  :: abort_part(0)
  fi;
  busy = false
}

proctype killer() {
  byte n = 0;
  do
  :: n < KILLS -> n++;
     if
     :: !closed[0] -> dead[0] = true
     :: !closed[1] -> dead[1] = true
     :: L > 2 && !closed[L - 1] -> dead[L - 1] = true
     fi
  :: break
  od
}

/* When all have gone. */
proctype last() {
  byte i = 0, r = 0, all = 0, others = 0; bool stolen = false;
  GONE(0) && GONE(1) && GONE(L - 1);
  take_lock(L);
  reap_dead(NOBODY);
  EACH_LANE(all, idle[i] && STAGE(i) == DONE);
  assert(state != WRITING || (all > 0 && all < N && !detached && !sealed)); /* they wait for others to join */
  done = true
}

init {
  atomic {
    run lane(0); run lane(1);
    if :: L > 2 -> run lane(2) :: else -> skip fi;
    if :: SECOND -> run second() :: else -> skip fi;
    run killer(); run last()
  };
  timeout -> assert(done) /* whatever dies, the living come to an end */
}
