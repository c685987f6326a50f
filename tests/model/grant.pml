/* A grant against eviction: one slot, the share word of one rank's lane, a granter in another lane, the rank, evictors of
 * which the second comes when the first is done or dead, and a clock. The protocol of read.c, share.h and evict.c:
 *
 *   granter  stores the lease; adds a reserved share to the rank's word (compare-and-swap); looks at the state word: READY,
 *            or EVICTING set back to READY, is OK, anything else means undo (visit_grant). May take back what it granted
 *   rank     claims a reserved share, else takes a fresh one; looks at the state word in the same way; releases
 *   evictor  marks EVICTING; reads the word and only then the lease: held, or reserved while the lease runs, means back to
 *            READY (sc_share_any); else EVICTING -> FREE with a new generation by compare-and-swap, which leaves an expired
 *            reserved share in the word, where it counts as zero (mark, finish)
 *   thief    finds the first evictor dead in the arena lock, and sets EVICTING back to READY (sc_recover)
 *   clock    ends the lease
 *
 * Any of them may stop for ever at any step: nobody here waits for a living one, and the first evictor may die (provided).
 * What must hold: the object of a share whose grant was answered OK stays until the share is claimed, taken back, or its
 * lease has ended; and that of a held share until it is released.
 *
 * GRANTS, READS, EVICTIONS, LAPSES: how often each process does what it does.
 * MUTATION (0: none) leaves out one step of the protocol, or swaps two, and must make the check fail:
 *   1 the evictor looks before it marks                         2 the granter does not look again
 *   3 the granter takes EVICTING for good and does not set it back
 *   4 the rank does not look again                              5 EVICTING -> FREE by a plain store
 */
#define READY 2
#define EVICTING 3
#ifndef GRANTS
#define GRANTS 2
#endif
#ifndef READS
#define READS 1
#endif
#ifndef EVICTIONS
#define EVICTIONS 2
#endif
#ifndef LAPSES
#define LAPSES 2
#endif
#ifndef MUTATION
#define MUTATION 0
#endif

byte state = READY, gen = 0;      /* one word; what is freed is written anew at once */
byte wgen = 0, res = 0, held = 0; /* the rank's share word */
bool lease = false;               /* it runs; at first no grant was made, and it is over */
bool gone = false, dead = false;  /* the first evictor */

/* For assertions only. */
bool promised = false; /* a share of this generation was granted, OK, is in the word, and its lease runs */
bool holding = false;  /* the rank holds one and has looked */

#define THERE(g) (state == READY && gen == g)

inline store_lease() { lease = true }

inline add_reserved() {
  d_step {
    if
    :: held + res > 0 && wgen > g -> ok = false
    :: else -> ok = true; if :: wgen == g -> res++ :: else -> wgen = g; res = 1; held = 0 fi
    fi
  }
}

/* sc_share_confirm; the answer is given in the same step. */
#define CONFIRM(back, answer) \
  if \
  :: d_step { THERE(g) -> ok = true; answer } \
  :: d_step { state == EVICTING && gen == g -> ok = true; if :: back -> state = READY :: else -> skip fi; answer } \
  :: d_step { gen != g -> ok = false } \
  fi

inline take_back() {
  d_step {
    if :: wgen == g && res > 0 -> res-- :: else -> skip fi;
    if :: wgen != g || res == 0 -> promised = false :: else -> skip fi
  }
}

proctype granter() {
  byte n = 0, g; bool ok;
  do
  :: n < GRANTS ->
     n++;
     g = gen;
     store_lease();
     add_reserved();
     if
     :: !ok -> skip
     :: else ->
#if MUTATION == 2
        d_step { promised = (wgen == g && res > 0 && lease) }
#else
        CONFIRM(MUTATION != 3, promised = (wgen == g && res > 0 && lease));
#endif
        if
        :: ok && n == GRANTS -> break /* it is the rank's */
        :: ok -> take_back()
        :: !ok -> take_back()
        fi
     fi
  :: n >= GRANTS -> break
  od
}

proctype rank() {
  byte n = 0, g; bool ok;
  do
  :: n < READS ->
     n++;
     g = gen;
     d_step {
       if
       :: held + res > 0 && wgen > g -> ok = false
       :: else ->
          ok = true;
          if
          :: wgen == g && res > 0 -> res--; held++; if :: res == 0 -> promised = false :: else -> skip fi
          :: wgen == g && res == 0 -> held++
          :: else -> wgen = g; held = 1; res = 0
          fi
       fi
     }
     if
     :: !ok -> skip
     :: else ->
#if MUTATION == 4
        holding = true;
#else
        CONFIRM(true, holding = true);
#endif
        if :: ok -> assert(gen == g) :: else -> skip fi;
        d_step { holding = false; if :: wgen == g && held > 0 -> held-- :: else -> assert(!ok) fi }
     fi
  :: n >= READS -> break
  od
}

inline mark() { d_step { state == READY -> state = EVICTING } }

inline evict() {
#if MUTATION != 1
  mark();
#endif
  d_step { busy = (wgen == gen && held > 0); saw = (wgen == gen && held == 0 && res > 0) }
  if
  :: saw ->
     over = !lease;
     busy = !over
  :: else -> skip
  fi;
#if MUTATION == 1
  mark();
#endif
  d_step {
    if
    :: state == EVICTING && busy -> state = READY
    :: (state == EVICTING || MUTATION == 5) && !busy -> assert(!promised && !holding); gen++; state = READY
    :: else -> skip
    fi;
    busy = false; saw = false; over = false
  }
}

proctype evictor() provided (!dead) {
  byte n = 0; bool over, busy, saw;
  do
  :: n < EVICTIONS -> n++; evict()
  :: n >= EVICTIONS -> break
  od;
  gone = true
}

proctype thief() {
  bool over, busy, saw;
  if
  :: gone
  :: dead -> d_step { if :: state == EVICTING -> state = READY :: else -> skip fi }
  fi;
  evict()
}

proctype killer() { if :: !gone -> dead = true :: skip fi }

proctype clock() {
  byte n = 0;
  do
  :: n < LAPSES -> n++; d_step { lease = false; promised = false }
  :: n >= LAPSES -> break
  od
}

init { atomic { run granter(); run rank(); run evictor(); run thief(); run killer(); run clock() } }
