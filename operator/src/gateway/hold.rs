//! Requests that wait for a worker: a pure, bounded, fair queue.
//!
//! Each group has its own line, first come first served. When something can go on, the groups
//! take turns, so one with a thousand waiters does not go before another's only one. When the
//! queue is full, room is made at the end of the longest line: a group that floods the gateway
//! refuses its own requests, not those of others.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Bound,
};

use super::pick::Moment;

/// Names a waiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

/// The queue. `K` is what lines form by, `W` what waits.
#[derive(Debug)]
pub struct HoldQueue<K, W> {
    limit: usize,
    next_ticket: u64,
    len: usize,
    lines: BTreeMap<K, VecDeque<Waiter<W>>>,
    /// The group that was served last; the next one goes first.
    last_served: Option<K>,
}

#[derive(Debug)]
struct Waiter<W> {
    ticket: Ticket,
    deadline: Moment,
    item: W,
}

/// What became of a request that asked to wait.
#[derive(Debug, PartialEq, Eq)]
pub enum Entry<W> {
    /// It waits.
    Held(Ticket),
    /// It waits, in the place of one of another, longer line.
    HeldInstead(Ticket, W),
    /// The queue is full and no line is longer than its own.
    Full(W),
}

impl<K: Ord + Clone, W> HoldQueue<K, W> {
    /// A queue for at most `limit` waiters.
    pub fn new(limit: usize) -> Self {
        Self { limit, next_ticket: 0, len: 0, lines: BTreeMap::new(), last_served: None }
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Puts a request at the end of its line.
    pub fn hold(&mut self, key: K, deadline: Moment, item: W) -> Entry<W> {
        let mut displaced = None;
        if self.len >= self.limit {
            let own = self.lines.get(&key).map_or(0, VecDeque::len);
            let longest =
                self.lines.iter().max_by_key(|(_, line)| line.len()).map(|(k, l)| (k.clone(), l.len()));
            match longest {
                Some((longest, length)) if length > own + 1 => displaced = self.drop_last(&longest),
                _ => return Entry::Full(item),
            }
        }
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.lines.entry(key).or_default().push_back(Waiter { ticket, deadline, item });
        self.len += 1;
        match displaced {
            Some(item) => Entry::HeldInstead(ticket, item),
            None => Entry::Held(ticket),
        }
    }

    fn drop_last(&mut self, key: &K) -> Option<W> {
        let line = self.lines.get_mut(key)?;
        let waiter = line.pop_back()?;
        if line.is_empty() {
            self.lines.remove(key);
        }
        self.len -= 1;
        Some(waiter.item)
    }

    /// Takes a waiter out that does not want to wait any longer.
    pub fn cancel(&mut self, key: &K, ticket: Ticket) -> Option<W> {
        let line = self.lines.get_mut(key)?;
        let at = line.binary_search_by_key(&ticket, |w| w.ticket).ok()?;
        let waiter = line.remove(at)?;
        if line.is_empty() {
            self.lines.remove(key);
        }
        self.len -= 1;
        Some(waiter.item)
    }

    /// Lets go who can: the groups take turns, beginning after the one served last, each with its oldest
    /// waiter for which `can_go` holds. A waiter that cannot go does not hold up those behind it.
    pub fn let_go(&mut self, mut can_go: impl FnMut(&K, &W) -> bool) -> Vec<W> {
        let mut order: Vec<K> = match &self.last_served {
            Some(last) => {
                let after = self.lines.range((Bound::Excluded(last), Bound::Unbounded));
                let until = self.lines.range((Bound::Unbounded, Bound::Included(last)));
                after.chain(until).map(|(k, _)| k.clone()).collect()
            }
            None => self.lines.keys().cloned().collect(),
        };
        let mut gone = Vec::new();
        // Per line: who has been looked at and stays.
        let mut staying: BTreeMap<K, VecDeque<Waiter<W>>> = BTreeMap::new();
        while !order.is_empty() {
            order.retain(|key| {
                let Some(line) = self.lines.get_mut(key) else { return false };
                while let Some(waiter) = line.pop_front() {
                    if can_go(key, &waiter.item) {
                        gone.push(waiter.item);
                        self.last_served = Some(key.clone());
                        return true;
                    }
                    staying.entry(key.clone()).or_default().push_back(waiter);
                }
                self.lines.remove(key);
                false
            });
        }
        self.lines = staying;
        self.len -= gone.len();
        gone
    }

    /// Takes out everyone whose deadline has come.
    pub fn expire(&mut self, now: Moment) -> Vec<W> {
        let mut expired = Vec::new();
        for line in self.lines.values_mut() {
            let (late, rest): (VecDeque<_>, VecDeque<_>) = line.drain(..).partition(|w| w.deadline <= now);
            expired.extend(late.into_iter().map(|w| w.item));
            *line = rest;
        }
        self.lines.retain(|_, line| !line.is_empty());
        self.len -= expired.len();
        expired
    }

    /// The first deadline.
    pub fn next_deadline(&self) -> Option<Moment> {
        self.lines.values().flatten().map(|w| w.deadline).min()
    }

    /// How many wait in each line.
    pub fn lengths(&self) -> impl Iterator<Item = (&K, usize)> {
        self.lines.iter().map(|(key, line)| (key, line.len()))
    }

    /// Everyone who waits, in no special order.
    pub fn iter(&self) -> impl Iterator<Item = &W> {
        self.lines.values().flatten().map(|w| &w.item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LATER: Moment = Moment::from_secs(100);

    fn queue(limit: usize, items: &[(char, u32)]) -> HoldQueue<char, u32> {
        let mut queue = HoldQueue::new(limit);
        for (key, item) in items {
            assert!(matches!(queue.hold(*key, LATER, *item), Entry::Held(_)));
        }
        queue
    }

    #[test]
    fn groups_take_turns_and_go_in_order() {
        let mut q = queue(9, &[('a', 1), ('a', 2), ('a', 3), ('b', 10), ('c', 20), ('c', 21)]);
        assert_eq!(q.let_go(|_, _| true), [1, 10, 20, 2, 21, 3]);
        assert!(q.is_empty());
        q.hold('a', LATER, 4);
        q.hold('b', LATER, 11);
        assert_eq!(q.let_go(|_, _| true), [11, 4], "a was served last, so b is first");
    }

    #[test]
    fn who_cannot_go_stays_in_place_and_holds_up_nobody() {
        let mut q = queue(9, &[('a', 1), ('a', 2), ('a', 3), ('b', 10)]);
        assert_eq!(q.let_go(|_, item| *item == 2), [2]);
        let mut room = 2;
        let gone = q.let_go(|_, _| {
            room -= 1;
            room >= 0
        });
        assert_eq!(gone, [10, 1], "room for two is shared");
        assert_eq!(q.let_go(|_, _| true), [3]);
    }

    #[test]
    fn a_full_queue_refuses_the_longest_line() {
        let mut q = queue(4, &[('a', 1), ('a', 2), ('a', 3), ('b', 10)]);
        assert_eq!(q.hold('a', LATER, 4), Entry::Full(4));
        assert!(matches!(q.hold('b', LATER, 11), Entry::HeldInstead(_, 3)));
        assert_eq!(q.hold('b', LATER, 12), Entry::Full(12), "lines of equal length");
        assert!(matches!(q.hold('c', LATER, 20), Entry::HeldInstead(_, 2 | 11)));
        assert_eq!(q.len(), 4);
        assert_eq!(HoldQueue::new(0).hold('a', LATER, 1), Entry::Full(1));
    }

    #[test]
    fn deadlines_and_cancellations_take_out_exactly_whom_they_should() {
        let mut q = HoldQueue::new(9);
        let Entry::Held(first) = q.hold('a', Moment::from_secs(1), 1) else { panic!() };
        q.hold('a', Moment::from_secs(3), 2);
        q.hold('b', Moment::from_secs(2), 3);
        assert_eq!(q.next_deadline(), Some(Moment::from_secs(1)));
        assert_eq!(q.cancel(&'a', first), Some(1));
        assert_eq!(q.cancel(&'a', first), None);
        assert_eq!(q.expire(Moment::from_secs(2)), [3]);
        assert_eq!(q.next_deadline(), Some(Moment::from_secs(3)));
        assert_eq!((q.len(), q.iter().copied().collect::<Vec<_>>()), (1, vec![2]));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Hold(u8, u8),
        Cancel(u8),
        LetGo(u8),
        Expire(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..4u8, 0..50u8).prop_map(|(k, d)| Step::Hold(k, d)),
            1 => any::<u8>().prop_map(Step::Cancel),
            1 => (0..6u8).prop_map(Step::LetGo),
            1 => (0..50u8).prop_map(Step::Expire),
        ]
    }

    proptest! {
        #[test]
        fn nobody_is_lost_the_bound_holds_and_shares_are_fair(
            limit in 0..8usize, steps in proptest::collection::vec(step(), 0..60)
        ) {
            let mut q = HoldQueue::new(limit);
            let (mut entered, mut left) = (0u32, 0u32);
            let mut tickets = Vec::new();
            for step in steps {
                match step {
                    Step::Hold(key, deadline) => {
                        entered += 1;
                        let own = q.lines.get(&key).map_or(0, VecDeque::len);
                        let longest = q.lines.values().map(VecDeque::len).max().unwrap_or(0);
                        match q.hold(key, Moment::from_secs(deadline.into()), key) {
                            Entry::Held(ticket) => tickets.push((key, ticket)),
                            Entry::HeldInstead(ticket, _) => { left += 1; tickets.push((key, ticket)); }
                            Entry::Full(_) => { left += 1; prop_assert!(longest <= own + 1); }
                        }
                    }
                    Step::Cancel(at) if !tickets.is_empty() => {
                        let (key, ticket) = tickets.swap_remove(usize::from(at) % tickets.len());
                        left += u32::from(q.cancel(&key, ticket).is_some());
                    }
                    Step::Cancel(_) => {}
                    Step::LetGo(room) => {
                        let mut room = room;
                        let before = q.len();
                        let gone = q.let_go(|_, _| { let ok = room > 0; room = room.saturating_sub(1); ok }).len();
                        prop_assert!(gone == before || room == 0);
                        left += u32::try_from(gone).unwrap();
                    }
                    Step::Expire(now) => left += u32::try_from(q.expire(Moment::from_secs(now.into())).len()).unwrap(),
                }
                prop_assert!(q.len() <= limit);
                prop_assert_eq!(q.len(), q.iter().count());
                prop_assert_eq!(q.len(), q.lengths().map(|(_, length)| length).sum::<usize>());
                prop_assert_eq!(u32::try_from(q.len()).unwrap(), entered - left);
                prop_assert!(q.lines.values().all(|l| !l.is_empty()));
            }
        }
    }
}
