/* A grant against the revocation of leases: one slot, the share word of one rank's lane, a granter in another lane, the
 * rank, an evictor that holds the arena lock, and a clock. The protocol of share.h and evict.h:
 *
 *   granter  stores the lease; adds a reserved share to the rank's word (compare-and-swap); looks at the state word:
 *            READY, or EVICTING set back to READY, is OK, anything else means undo. May take back what it granted,
 *            and grant anew
 *   rank     claims a reserved share, else takes a fresh one; looks at the state word in the same way; releases
 *   evictor  marks EVICTING; reads the share word and only then the lease; where shares are reserved and the lease is
 *            over, takes them by compare-and-swap from the word that it read, and reads the lease once more: where it
 *            runs, what was taken may have been granted just now (the word looks the same when one grant is taken back
 *            and another is made), and is put back; EVICTING -> FREE by compare-and-swap
 *   clock    ends the lease
 *
 * What must hold: a share whose grant was OK is in the word until it is claimed, taken back, or its lease has ended.
 * For an instant it may be in the evictor's hand; who takes it back then is told that there is none, and the share
 * that is put back ends with its lease.
 *
 * GRANTS, READS, EVICTIONS, LAPSES: how often each process does what it does.
 * MUTATION (0: none) leaves out one step of the protocol, and must make the check fail:
 *   1 the lease is read before the word   2 the lease is not read again   3 the granter does not look again
 *   4 what is put back does not renew the generation of a word that a late reader has set back
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
#define NONE 255

byte state = READY, gen = 0;      /* one word */
byte wgen = 0, res = 0, held = 0; /* the rank's share word */
bool lease = false;               /* it runs; at first no grant was made, and it is over */

/* Where the granter's latest share is; for assertions only. */
mtype = { nowhere, in_word, claimed, in_hand, revoked };
mtype share = nowhere;
bool lapsed = false; /* the lease has ended since the granter stored it */

#define IN_WORD(g) (wgen == g && res > 0)
#define THERE(g) (state == READY && gen == g)

/* The look at the state word after the own change: ok says whether the object of g is still there. */
inline confirm(g, ok) {
  if
  :: d_step { THERE(g) -> ok = true }
  :: d_step { state == EVICTING && gen == g -> state = READY; ok = true }
  :: d_step { gen != g -> ok = false }
  fi
}

proctype granter() {
  byte n = 0, g; bool ok;
  do
  :: n < GRANTS ->
     n++;
     g = gen;
     d_step { lease = true; lapsed = false }
     d_step {
       if
       :: held + res > 0 && wgen > g -> ok = false
       :: else ->
          ok = true;
          if :: wgen == g -> res++ :: else -> wgen = g; res = 1; held = 0 fi;
          share = in_word
       fi
     }
     if
     :: !ok -> skip
     :: else ->
        if :: MUTATION != 3 -> confirm(g, ok) :: else -> skip fi;
        if
        :: ok ->
           d_step { assert(share == in_word || share == claimed || share == in_hand || lapsed) }
           d_step { assert(gen == g || share != in_word || lapsed) }
           if
           :: break /* it is the rank's */
           :: d_step {
                if
                :: IN_WORD(g) -> res--
                :: else -> assert(share == claimed || share == in_hand || lapsed)
                fi;
                share = nowhere
              }
           fi
        :: else -> d_step { if :: IN_WORD(g) -> res-- :: else -> skip fi; share = nowhere }
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
          :: IN_WORD(g) -> res--; held++; if :: share == in_word -> share = claimed :: else -> skip fi
          :: !IN_WORD(g) && wgen == g -> held++
          :: else -> wgen = g; held = 1; res = 0
          fi
       fi
     }
     if
     :: !ok -> skip
     :: else ->
        confirm(g, ok);
        if :: ok -> assert(gen == g) :: else -> skip fi;
        d_step { if :: wgen == g && held > 0 -> held-- :: else -> assert(!ok) fi }
     fi
  :: n >= READS -> break
  od
}

proctype evictor() {
  byte n = 0, saw, taken; bool over, busy;
  do
  :: n < EVICTIONS ->
     n++;
     busy = false;
     d_step { assert(state == READY); state = EVICTING }
     over = !lease;
     if
     :: d_step { wgen == gen && held > 0 -> busy = true }
     :: d_step { wgen == gen && held == 0 && res > 0 -> saw = res }
        if :: MUTATION != 1 -> over = !lease :: else -> skip fi;
        if
        :: !over -> busy = true
        :: else ->
           d_step {
             if
             :: wgen == gen && held == 0 && res == saw ->
                taken = res;
                res = 0;
                if :: share == in_word -> share = in_hand :: else -> skip fi
             :: else -> busy = true; taken = 0 /* the core reads it again */
             fi
           }
           if
           :: taken > 0 && lease && MUTATION != 1 && MUTATION != 2 -> /* put back, as a grant is made */
              busy = true;
              d_step {
                if
                :: wgen == gen || MUTATION == 4 -> res = res + taken
                :: else -> wgen = gen; res = taken; held = 0
                fi;
                if :: share == in_hand -> share = in_word :: else -> skip fi
              }
           :: else -> d_step { if :: share == in_hand -> assert(lapsed); share = revoked :: else -> skip fi }
           fi
        fi
     :: d_step { wgen != gen || held + res == 0 -> skip }
     fi;
     d_step {
       if
       :: state == EVICTING && busy -> state = READY
       :: state == EVICTING && !busy -> gen++; state = READY /* and written anew */
       :: else -> skip
       fi
     }
  :: n >= EVICTIONS -> break
  od
}

proctype clock() {
  byte n = 0;
  do
  :: n < LAPSES -> n++; d_step { lease = false; lapsed = true }
  :: n >= LAPSES -> break
  od
}

init { atomic { run granter(); run rank(); run evictor(); run clock() } }
