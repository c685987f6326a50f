/* Readers against evicting and reusing writers: one slot, one key a generation. The protocol of share.h, slot.h and
 * lock.h, as the C core has it:
 *
 *   reader   look at the state word; claim or take in the own share word (compare-and-swap; never a generation back);
 *            look at the state word again: READY protects, EVICTING is set back to READY (compare-and-swap) and then
 *            protects, anything else means undo
 *   writer   takes the arena lock, by theft from a dead lane; marks EVICTING, then scans the share words, then EVICTING
 *            -> FREE by compare-and-swap, which fails where a reader called the eviction off; WRITING, fills without
 *            the lock, grants a reserved share to reader 0, then READY
 *
 * Any process may stop for ever at the marked places: a dead lane's shares count no more (here at once, in the core
 * after it is reaped), its lock is stolen, what it was writing is freed. spin's model is sequentially consistent: this
 * checks the protocol, not the fences. content = which generation's bytes lie in the blocks. A reader that holds a
 * share must see its own generation's bytes, and a reserved share whose lease runs must be worth as much.
 *
 * READS, WRITES: how often each reader reads and each writer writes.
 * MUTATION (0: none) leaves out one step of the protocol, and must make the check fail:
 *   1 the reader does not look again   2 the evictor scans before it marks   3 EVICTING -> FREE by a plain store
 *   4 the word's generation may go back   5 READY before the grant   6 READY before the bytes
 *   7 the reader takes EVICTING for good and does not set it back
 */
#define FREE 0
#define WRITING 1
#define READY 2
#define EVICTING 3
#ifndef READS
#define READS 2
#endif
#ifndef WRITES
#define WRITES 2
#endif
#ifndef MUTATION
#define MUTATION 0
#endif
#define NONE 255

byte state = FREE, gen = 0, content = 0; /* state and gen are one word: always changed in one step */
byte wgen[2], held[2], res[2];           /* share words of the reader lanes: one word each */
bool dead[4];                            /* lanes 0, 1: readers; 2, 3: writers */
byte lock = 0;                           /* 0, or lane + 1 */
byte owner = 0;                          /* of a WRITING slot */
bool promised = false;                   /* reader 0 was granted a share of this generation, unrevoked, unclaimed */

#define ALIVE_OR_STOP(me) if :: true -> skip :: d_step { dead[me] = true; if :: me == 0 -> promised = false :: else -> skip fi }; goto end fi

inline acquire_lock(me) {
  do
  :: d_step { lock == 0 -> lock = me + 1 } break
  :: d_step { lock != 0 && dead[lock - 1] -> lock = me + 1; stolen = true } break
  od;
  if
  :: stolen -> /* recover: EVICTING back to READY; WRITING of a dead owner freed */
     d_step {
       if
       :: state == EVICTING -> state = READY
       :: state == WRITING && dead[owner] -> state = FREE; gen++; promised = false
       :: else -> skip
       fi;
       stolen = false
     }
  :: else -> skip
  fi
}

inline release_lock(me) { d_step { if :: lock == me + 1 -> lock = 0 :: else -> skip fi } }

proctype reader(byte me) {
  byte g, n = 0; bool ok;
  do
  :: n < READS ->
     n++;
     d_step { g = NONE; if :: state == READY || state == EVICTING -> g = gen :: else -> skip fi }
     if
     :: g == NONE -> skip
     :: else ->
        d_step {
          ok = true;
          if
          :: MUTATION != 4 && held[me] + res[me] > 0 && wgen[me] > g -> ok = false /* late: the object is gone */
          :: else ->
             if
             :: wgen[me] == g && res[me] > 0 -> res[me]--; held[me]++; if :: me == 0 -> promised = false :: else -> skip fi
             :: wgen[me] == g && res[me] == 0 -> held[me]++
             :: else -> wgen[me] = g; held[me] = 1; res[me] = 0
             fi
          fi
        }
        if
        :: !ok -> skip
        :: else ->
           ALIVE_OR_STOP(me);
           if
           :: MUTATION == 1 -> skip
           :: d_step { MUTATION != 1 && state == READY && gen == g -> skip }
           :: d_step { MUTATION != 1 && state == EVICTING && gen == g -> if :: MUTATION != 7 -> state = READY :: else -> skip fi }
           :: d_step { MUTATION != 1 && !((state == READY || state == EVICTING) && gen == g) -> ok = false }
           fi;
           if
           :: ok ->
              assert(content == g); /* the share is held: the bytes stay */
              ALIVE_OR_STOP(me);
              assert(content == g)
           :: else -> skip
           fi;
           d_step { if :: wgen[me] == g && held[me] > 0 -> held[me]-- :: else -> assert(!ok) fi }
        fi
     fi
  :: n >= READS -> break
  od;
end: skip
}

/* One lane's word, as the evictor reads it: sc_share_any. A reserved share whose lease is over stays where it is. */
inline scan(i) {
  if
  :: d_step { wgen[i] == gen && !dead[i] && held[i] > 0 -> busy = true }
  :: d_step { wgen[i] == gen && !dead[i] && held[i] == 0 && res[i] > 0 -> seen = true }
     if
     :: busy = true /* the lease runs */
     :: d_step { if :: i == 0 -> promised = false :: else -> skip fi } /* it is over */
     fi;
     seen = false
  :: d_step { !(wgen[i] == gen && !dead[i] && held[i] + res[i] > 0) -> skip }
  fi
}

inline mark() { d_step { state == READY -> state = EVICTING } }

proctype writer(byte me) {
  bool stolen = false, busy, seen = false; byte n = 0, g;
  do
  :: n < WRITES ->
     n++;
     acquire_lock(me);
     ALIVE_OR_STOP(me);
     if
     :: state == READY ->
        busy = false;
        if :: MUTATION != 2 -> mark() :: else -> skip fi;
        ALIVE_OR_STOP(me);
        scan(0);
        scan(1);
        if :: MUTATION == 2 -> mark() :: else -> skip fi;
        if
        :: busy -> d_step { if :: state == EVICTING -> state = READY :: else -> skip fi }
        :: else ->
           d_step {
             if
             :: state == EVICTING || MUTATION == 3 ->
                assert(!promised); /* nobody was promised what goes now */
                state = FREE; gen++
             :: else -> skip
             fi
           }
        fi
     :: d_step { state == WRITING && dead[owner] -> state = FREE; gen++; promised = false }
     :: else -> skip
     fi;
     if
     :: d_step { state == FREE -> state = WRITING; owner = me; g = gen }
        release_lock(me);
        ALIVE_OR_STOP(me);
        if :: MUTATION == 6 -> d_step { state = READY } :: else -> skip fi;
        content = 100 + me; /* half-written */
        ALIVE_OR_STOP(me);
        content = g;
        if :: MUTATION == 5 -> d_step { promised = !dead[0]; state = READY } :: else -> skip fi;
        d_step {
          if
          :: MUTATION != 5 -> promised = !dead[0]
          :: else -> skip
          fi;
          if
          :: wgen[0] == g -> res[0]++
          :: else -> wgen[0] = g; res[0] = 1; held[0] = 0
          fi
        }
        ALIVE_OR_STOP(me);
        if
        :: MUTATION == 5 || MUTATION == 6 -> skip
        :: else -> assert(state == WRITING && owner == me && gen == g); d_step { state = READY }
        fi
     :: else -> release_lock(me)
     fi
  :: n >= WRITES -> break
  od;
end: skip
}

init { atomic { run reader(0); run reader(1); run writer(2); run writer(3) } }
