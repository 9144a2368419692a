//! The volume that workers keep fetched files on. Pure.

use k8s_openapi::{
    api::core::v1::{
        EmptyDirVolumeSource, EphemeralVolumeSource, PersistentVolumeClaimSpec,
        PersistentVolumeClaimTemplate, PersistentVolumeClaimVolumeSource, Volume, VolumeResourceRequirements,
    },
    apimachinery::pkg::{api::resource::Quantity, apis::meta::v1::ObjectMeta},
};
use turret_crds::{ModelPlacement, placement::cache::EphemeralCache};

use super::resources::selector;

/// Name of the volume.
pub const NAME: &str = "cache";
/// Disk of a worker without a `diskBudget`.
const DEFAULT_DISK_BYTES: u64 = 64 << 30;
/// A folder of the node may be this much larger than the budget, which counts whole files only.
const DISK_MARGIN_BYTES: u64 = 1 << 30;

/// The volume, as `spec.cache` says.
pub fn volume(placement: &ModelPlacement) -> Volume {
    let cache = placement.spec.cache.clone().unwrap_or_default();
    let volume = Volume { name: NAME.into(), ..Volume::default() };
    if let Some(claim) = cache.persistent_volume_claim {
        let source = PersistentVolumeClaimVolumeSource { claim_name: claim.claim_name, read_only: None };
        return Volume { persistent_volume_claim: Some(source), ..volume };
    }
    if let Some(own) = cache.ephemeral {
        return Volume { ephemeral: Some(claim_of_each(placement, own)), ..volume };
    }
    let limit = cache.empty_dir.and_then(|folder| folder.size_limit).map(|size| Quantity(size.0));
    let limit = limit.unwrap_or_else(|| {
        let budget = disk_budget(placement).unwrap_or(DEFAULT_DISK_BYTES);
        Quantity(budget.saturating_add(DISK_MARGIN_BYTES).to_string())
    });
    Volume { empty_dir: Some(EmptyDirVolumeSource { size_limit: Some(limit), medium: None }), ..volume }
}

/// Ephemeral storage that a worker sets aside, bytes: its budget, where the cache is on the node's own disk.
pub fn ephemeral_storage(placement: &ModelPlacement) -> Option<u64> {
    let is_on_node = placement.spec.cache.as_ref().is_none_or(|cache| cache.is_on_node());
    disk_budget(placement).filter(|_| is_on_node)
}

/// The disk budget, when one is given that can be read; an unreadable one is refused with a
/// condition before anything is made from it.
fn disk_budget(placement: &ModelPlacement) -> Option<u64> {
    placement.spec.memory.as_ref()?.disk_budget.as_ref()?.bytes().ok()
}

/// A claim that is made with each pod and goes with it.
fn claim_of_each(placement: &ModelPlacement, cache: EphemeralCache) -> EphemeralVolumeSource {
    let size = VolumeResourceRequirements {
        requests: Some([("storage".to_owned(), Quantity(cache.size.0))].into()),
        limits: None,
    };
    EphemeralVolumeSource {
        volume_claim_template: Some(PersistentVolumeClaimTemplate {
            // So that the claims of a placement can be listed.
            metadata: Some(ObjectMeta { labels: Some(selector(placement)), ..ObjectMeta::default() }),
            spec: PersistentVolumeClaimSpec {
                access_modes: Some(vec!["ReadWriteOnce".into()]),
                resources: Some(size),
                storage_class_name: cache.storage_class_name,
                ..PersistentVolumeClaimSpec::default()
            },
        }),
    }
}
