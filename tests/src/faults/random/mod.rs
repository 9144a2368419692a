//! Random objects on a real API server, made from the CRDs' own schemas ([`generate`], [`spoil`]).
//!
//! Each is judged by the API server as it is without one ([`verdicts`]). Valid ones are applied, changed and deleted in several
//! orders ([`edits`]): all come to the same end, no status ever says what cannot be so ([`truth`]), what is changed by hand is
//! repaired ([`tamper`]), and when all is deleted nothing is left.

pub mod agree;
pub mod edits;
pub mod generate;
pub mod kind;
pub mod spoil;
pub mod tamper;
pub mod truth;
pub mod verdicts;

use anyhow::{Context, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use turret_crds::{ModelGroup, ModelPlacement};

use self::edits::{Edit, histories, in_any_order};
use self::kind::kinds;
use self::tamper::tamper;
use self::truth::{Witness, rests, wherever_it_came_from};
use super::end_state::EndState;
use super::step::Step;
use super::story::{NO_IMAGE, Story, is};
use super::world::World;
use crate::cluster::environment::RANDOM_SEED;
use crate::numbers::{Numbers, scattered};

/// Objects of each kind that are judged, for each case.
const JUDGED_OF_EACH: usize = 100;
/// Cases that go on at the same time.
const AT_ONCE: usize = 3;

/// The API server takes and refuses exactly what `turret_crds::validate` does.
pub async fn random_objects_are_judged_the_same_without_a_cluster(world: &World) -> Result<()> {
    let (seed, cases) = (world.environment.random_seed, world.environment.random_cases);
    let judged = verdicts::compare(&world.client, &mut Numbers::of(seed), JUDGED_OF_EACH * cases)
        .await
        .with_context(|| format!("{RANDOM_SEED}={seed}"))?;
    let verdicts::Judged { valid, refused } = judged;
    println!("    {} objects: {valid} valid, {refused} refused, as without a cluster", valid + refused);
    ensure!(valid > 0 && refused > 0, "objects of one sort only show nothing");
    Ok(())
}

/// What a case has shown.
#[derive(Clone, Copy, Debug, Default)]
struct Shown {
    edits: usize,
    repaired: usize,
    versions: usize,
}

/// The same edits in two orders, one of them all made before the operator starts, come to the same end.
pub async fn random_objects_come_to_the_same_end_in_any_order(world: &World) -> Result<()> {
    let seed = world.environment.random_seed;
    let cases = u64::try_from(world.environment.random_cases)?;
    let told: Vec<Shown> = stream::iter(0..cases)
        .map(|number| async move {
            let told = tell(world, number, scattered(seed, number)).await;
            told.with_context(|| format!("case {number} of {RANDOM_SEED}={seed}"))
        })
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await?;
    let sum = |of: fn(&Shown) -> usize| told.iter().map(of).sum::<usize>();
    println!(
        "    {cases} cases: {} edits, {} owned objects changed by hand and repaired, {} versions of statuses looked at",
        sum(|shown| shown.edits),
        sum(|shown| shown.repaired),
        sum(|shown| shown.versions),
    );
    Ok(())
}

async fn tell(world: &World, number: u64, seed: u64) -> Result<Shown> {
    let mut numbers = Numbers::of(seed);
    let histories = histories(&kinds(), &mut numbers);
    let orders = [(); 2].map(|()| in_any_order(&histories, &mut numbers));

    let mut first = Story::begin(world, &format!("random-{number}-first"), None, seed).await?;
    let mut witness = Witness::default();
    witness.watch::<ModelGroup>(first.all());
    witness.watch::<ModelPlacement>(first.all());
    let start = first.carry_out(Step::Start, None, |state| Step::Start.is_reached(state)).await?;
    first.proxy.begin_step(None);
    carry_out(&first, &orders[0]).await?;
    let state = first.settles("edits of random objects", rests).await?;
    let end = wherever_it_came_from(&state);

    first.proxy.begin_step(None);
    let repaired = tamper(&first, &mut numbers).await?;
    let as_before = |state: &EndState| rests(state).and_then(|()| is(&wherever_it_came_from(state), &end));
    first.settles("what was changed by hand", as_before).await?;

    let mut second = Story::begin(world, &format!("random-{number}-second"), None, seed).await?;
    second.proxy.begin_step(None);
    carry_out(&second, &orders[1]).await?;
    second.start(NO_IMAGE)?;
    second.settles("the same edits in another order, before the operator is there", as_before).await?;

    for story in [first, second] {
        story.proxy.begin_step(None);
        let mut gone: Vec<Edit> = histories.iter().map(|h| Edit { object: None, ..h[0].clone() }).collect();
        numbers.shuffle(&mut gone);
        carry_out(&story, &gone).await?;
        story.settles("deleting everything", |state| is(state, &start)).await?;
        let exits = story.lives().map(|lives| lives.exits).unwrap_or_default();
        ensure!(exits.is_empty(), "{}: the operator ended by itself: {exits:?}", story.namespace);
        let complaints = world.node.complaints(&story.namespace);
        ensure!(
            complaints.is_empty(),
            "{}: workers were sent what no operator should send: {complaints:?}",
            story.namespace
        );
        story.remove().await?;
    }
    let (versions, lies) = witness.said();
    ensure!(lies.is_empty(), "statuses said what cannot be so:\n{}", lies.join("\n"));
    let edits = 2 * histories.iter().map(Vec::len).sum::<usize>();
    Ok(Shown { edits, repaired, versions })
}

async fn carry_out(story: &Story<'_>, edits: &[Edit]) -> Result<()> {
    for edit in edits {
        match (edit.kind.as_str(), &edit.object) {
            ("ModelGroup", Some(object)) => story.apply::<ModelGroup>(object).await?,
            ("ModelGroup", None) => story.delete::<ModelGroup>(&edit.name).await?,
            (_, Some(object)) => story.apply::<ModelPlacement>(object).await?,
            (_, None) => story.delete::<ModelPlacement>(&edit.name).await?,
        }
    }
    Ok(())
}
