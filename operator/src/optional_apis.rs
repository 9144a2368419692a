//! APIs that not every cluster serves. They are looked for once, when the operator starts: what is not served is not
//! watched, and placements that need it are told so. When the API server begins to serve one, the operator must be
//! restarted.

use std::time::Duration;

use kube::{Client, Error};

use crate::telemetry::chain;

/// An API server that does not answer is asked again after this long.
const RETRY: Duration = Duration::from_secs(1);
/// Group and version of dynamic resource allocation.
const RESOURCE: &str = "resource.k8s.io/v1";

/// What the API server serves of what is optional.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionalApis {
    /// Templates of claims for devices.
    pub resource_claim_templates: bool,
}

impl OptionalApis {
    /// Asks the API server, until it answers.
    pub async fn find(client: &Client) -> Self {
        loop {
            match serves(client, RESOURCE, "resourceclaimtemplates").await {
                Ok(resource_claim_templates) => {
                    tracing::info!(resource_claim_templates, "looked for optional APIs");
                    return Self { resource_claim_templates };
                }
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "failed to ask which APIs are served, trying again")
                }
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// Whether a version of an API group is served, and has a resource.
async fn serves(client: &Client, version: &str, resource: &str) -> Result<bool, Error> {
    match client.list_api_group_resources(version).await {
        Ok(list) => Ok(list.resources.iter().any(|served| served.name == resource)),
        // What may not be looked at may not be used either.
        Err(Error::Api(status)) if status.is_not_found() || status.is_forbidden() => Ok(false),
        Err(error) => Err(error),
    }
}
